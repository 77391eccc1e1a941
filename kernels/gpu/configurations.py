"""The launch configurations of the Triton kernels: one fixed table for all architectures.

A configuration is chosen by kernel, architecture and size alone, so equal calls run equal code and repeat bit for bit.
`iisan-fast bench kernels --tune` searches for better ones and prints entries for this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# With fewer rows than this, a launch cannot fill the device; small tiles give more programs.
SMALL_ROWS = 2048
# Above this embedding dimension the kernels that hold whole rows, of the loss and the rank, take smaller tiles.
WIDE = 64
# The fp32 entries serve fp32 operands and any number of rows: no pipeline, tiles small enough for IEEE products.
SIZES = ("small", "large", "fp32")
ROW_SIZES = (*SIZES, "wide")
# The fold reads only weights, so its sizes do not depend on the batch.
WEIGHT_SIZES = ("small", "fp32")
# The only entry of a kernel that reads each element once; it serves all sizes and dtypes.
ANY_SIZE = "any"


@dataclass(frozen=True)
class Configuration:
    """Tile sizes by their names in the kernel, warps of a program, and stages of the software pipeline."""

    blocks: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2


# kernel -> (architecture, size) -> configuration. "default" serves every architecture without an entry of its own, and
# fits in the 99 KB of shared memory of the smaller GPUs. None spills registers at the published sizes.
CONFIGURATIONS: dict[str, dict[tuple[str, str], Configuration]] = {
    "side_project": {
        ("default", "small"): Configuration({"BM": 16, "BD": 32, "GROUP": 7}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 32, "BD": 32, "GROUP": 4}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "BD": 16, "GROUP": 2}, warps=4, stages=1),
        ("sm_90", "small"): Configuration({"BM": 16, "BD": 64, "GROUP": 7}, warps=4, stages=2),
        ("sm_90", "large"): Configuration({"BM": 64, "BD": 32, "GROUP": 7}, warps=8, stages=3),
    },
    "side_recur": {
        ("default", "small"): Configuration({"BM": 16}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 64}, warps=4, stages=2),
        ("default", "fp32"): Configuration({"BM": 16}, warps=8, stages=1),
    },
    "side_expand": {
        ("default", "small"): Configuration({"BM": 32, "BD": 64, "BQ": 64}, warps=4, stages=3),
        ("default", "large"): Configuration({"BM": 128, "BD": 128, "BQ": 32}, warps=8, stages=3),
        ("default", "fp32"): Configuration({"BM": 32, "BD": 64, "BQ": 32}, warps=4, stages=1),
    },
    "side_collect": {
        ("default", "small"): Configuration({"BM": 32, "BD": 64, "BQ": 64}, warps=4, stages=3),
        ("default", "large"): Configuration({"BM": 128, "BD": 32, "BQ": 64}, warps=8, stages=3),
        ("default", "fp32"): Configuration({"BM": 32, "BD": 32, "BQ": 32}, warps=4, stages=1),
    },
    "side_recur_backward": {
        ("default", "small"): Configuration({"BM": 16}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 64}, warps=4, stages=2),
        ("default", "fp32"): Configuration({"BM": 16}, warps=8, stages=1),
    },
    "side_weight_gradients": {
        ("default", "small"): Configuration({"BM": 32, "BD": 32, "GROUP": 2, "PROGRAMS": 256}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 32, "BD": 64, "GROUP": 2, "PROGRAMS": 528}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "BD": 32, "GROUP": 1, "PROGRAMS": 256}, warps=8, stages=1),
        ("sm_90", "small"): Configuration({"BM": 32, "BD": 32, "GROUP": 7, "PROGRAMS": 256}, warps=4, stages=2),
        ("sm_90", "large"): Configuration({"BM": 32, "BD": 64, "GROUP": 7, "PROGRAMS": 264}, warps=8, stages=2),
    },
    "side_mix_gradients": {
        ("default", "small"): Configuration({"BM": 16, "BD": 64, "GROUP": 7, "CHUNKS": 3}, warps=4, stages=1),
        ("default", "large"): Configuration({"BM": 64, "BD": 16, "GROUP": 4, "CHUNKS": 1024}, warps=4, stages=1),
        ("default", "fp32"): Configuration({"BM": 16, "BD": 32, "GROUP": 4, "CHUNKS": 4}, warps=4, stages=1),
        ("sm_90", "small"): Configuration({"BM": 16, "BD": 32, "GROUP": 7, "CHUNKS": 4}, warps=4, stages=2),
        ("sm_90", "large"): Configuration({"BM": 64, "BD": 16, "GROUP": 7, "CHUNKS": 1024}, warps=4, stages=2),
    },
    "side_join": {("default", ANY_SIZE): Configuration({"BM": 32}, warps=4, stages=1)},
    "side_hidden_gradients": {
        ("default", "small"): Configuration({"BM": 32}, warps=4, stages=3),
        ("default", "large"): Configuration({"BM": 32}, warps=4, stages=3),
        ("default", "fp32"): Configuration({"BM": 16}, warps=4, stages=1),
        ("sm_90", "large"): Configuration({"BM": 64}, warps=4, stages=3),
    },
    "side_sum_gradients": {("default", ANY_SIZE): Configuration({"BLOCK": 1024, "BP": 32}, warps=4, stages=1)},
    "loss_forward": {
        ("default", "small"): Configuration({"BM": 16, "SUB": 2}, warps=4, stages=3),
        ("default", "large"): Configuration({"BM": 128, "SUB": 2}, warps=8, stages=2),
        ("default", "wide"): Configuration({"BM": 64, "SUB": 1}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "SUB": 1}, warps=8, stages=1),
        ("sm_90", "large"): Configuration({"BM": 128, "SUB": 4}, warps=8, stages=2),
        ("sm_90", "wide"): Configuration({"BM": 128, "SUB": 2}, warps=8, stages=2),
    },
    "loss_query_gradients": {
        ("default", "small"): Configuration({"BM": 16, "SUB": 2}, warps=4, stages=3),
        ("default", "large"): Configuration({"BM": 128, "SUB": 2}, warps=8, stages=2),
        ("default", "wide"): Configuration({"BM": 64, "SUB": 1}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "SUB": 1}, warps=8, stages=1),
        ("sm_90", "large"): Configuration({"BM": 128, "SUB": 4}, warps=8, stages=2),
        ("sm_90", "wide"): Configuration({"BM": 128, "SUB": 2}, warps=8, stages=2),
    },
    "loss_item_gradients": {
        ("default", "small"): Configuration({"BM": 32, "BN": 32, "SUB": 1, "PROGRAMS": 128}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 32, "BN": 64, "SUB": 1, "PROGRAMS": 528}, warps=4, stages=2),
        ("default", "wide"): Configuration({"BM": 32, "BN": 64, "SUB": 1, "PROGRAMS": 528}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "BN": 32, "SUB": 1, "PROGRAMS": 528}, warps=8, stages=1),
        ("sm_90", "large"): Configuration({"BM": 32, "BN": 128, "SUB": 2, "PROGRAMS": 264}, warps=8, stages=2),
        ("sm_90", "wide"): Configuration({"BM": 32, "BN": 128, "SUB": 1, "PROGRAMS": 264}, warps=8, stages=2),
    },
    "item_vector_gradients": {
        ("default", "small"): Configuration({"BV": 16, "BK": 32}, warps=4, stages=1),
        ("default", "large"): Configuration({"BV": 32, "BK": 32}, warps=4, stages=1),
        ("default", "wide"): Configuration({"BV": 32, "BK": 32}, warps=8, stages=1),
        ("default", "fp32"): Configuration({"BV": 16, "BK": 32}, warps=4, stages=1),
    },
    "sequence_forward": {
        ("default", "small"): Configuration({"STACK": 64, "FC": 64, "HALVES": 0}, warps=8, stages=1),
        ("default", "large"): Configuration({"STACK": 64, "FC": 64, "HALVES": 1}, warps=8, stages=1),
        ("default", "wide"): Configuration({"STACK": 64, "FC": 64, "HALVES": 1}, warps=8, stages=1),
        ("default", "fp32"): Configuration({"STACK": 32, "FC": 16, "HALVES": 1}, warps=8, stages=1),
        ("sm_90", "small"): Configuration({"STACK": 64, "FC": 64, "HALVES": 0}, warps=8, stages=2),
        ("sm_90", "large"): Configuration({"STACK": 64, "FC": 64, "HALVES": 0}, warps=8, stages=2),
    },
    "sequence_backward": {
        ("default", "small"): Configuration({"STACK": 32, "FC": 64, "HALVES": 0}, warps=8, stages=1),
        ("default", "large"): Configuration({"STACK": 32, "FC": 64, "HALVES": 1}, warps=8, stages=1),
        ("default", "wide"): Configuration({"STACK": 32, "FC": 64, "HALVES": 1}, warps=8, stages=1),
        ("default", "fp32"): Configuration({"STACK": 32, "FC": 16, "HALVES": 1}, warps=8, stages=1),
        ("sm_90", "small"): Configuration({"STACK": 32, "FC": 64, "HALVES": 0}, warps=8, stages=2),
        ("sm_90", "large"): Configuration({"STACK": 32, "FC": 64, "HALVES": 0}, warps=8, stages=2),
    },
    "sequence_weight_gradients": {
        ("default", "small"): Configuration({"BN": 64, "BK": 32, "SPLITS": 4}, warps=4, stages=2),
        ("default", "large"): Configuration({"BN": 64, "BK": 32, "SPLITS": 16}, warps=4, stages=2),
        ("default", "wide"): Configuration({"BN": 64, "BK": 32, "SPLITS": 16}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BN": 32, "BK": 32, "SPLITS": 4}, warps=4, stages=1),
    },
    "fold_chains": {
        ("default", "small"): Configuration({"BD": 16, "BH": 64, "ROWS": 16, "COLUMNS": 256}, warps=4, stages=4),
        ("default", "fp32"): Configuration({"BD": 16, "BH": 16, "ROWS": 16, "COLUMNS": 256}, warps=8, stages=1),
    },
    "fold_prepare": {
        ("default", "small"): Configuration(
            {"BR": 64, "BC": 32, "BD": 64, "ROWS": 16, "COLUMNS": 256}, warps=4, stages=4
        ),
        ("default", "fp32"): Configuration(
            {"BR": 32, "BC": 32, "BD": 16, "ROWS": 16, "COLUMNS": 256}, warps=4, stages=1
        ),
    },
    "fold_backward": {
        ("default", "small"): Configuration({"BR": 64, "BD": 128}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BR": 16, "BD": 32}, warps=4, stages=1),
    },
    "fold_chains_backward": {
        ("default", "small"): Configuration({"BM": 64, "BN": 16, "BH": 64, "BD": 128}, warps=4, stages=3),
        ("default", "fp32"): Configuration({"BM": 16, "BN": 16, "BH": 32, "BD": 32}, warps=4, stages=1),
    },
    "sum_parts": {("default", ANY_SIZE): Configuration({"BLOCK": 512}, warps=4, stages=1)},
    "target_rank": {
        ("default", "small"): Configuration({"BM": 16, "BN": 16, "PROGRAMS": 528}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 64, "BN": 64, "PROGRAMS": 1056}, warps=4, stages=2),
        ("default", "wide"): Configuration({"BM": 32, "BN": 32, "PROGRAMS": 1056}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "BN": 16, "PROGRAMS": 1056}, warps=8, stages=1),
    },
    "top_items": {
        ("default", "small"): Configuration({"BM": 16, "BN": 16, "PROGRAMS": 528}, warps=4, stages=2),
        ("default", "large"): Configuration({"BM": 32, "BN": 32, "PROGRAMS": 1056}, warps=8, stages=2),
        ("default", "wide"): Configuration({"BM": 32, "BN": 32, "PROGRAMS": 1056}, warps=8, stages=2),
        ("default", "fp32"): Configuration({"BM": 16, "BN": 16, "PROGRAMS": 1056}, warps=2, stages=1),
    },
    "select_batch": {("default", ANY_SIZE): Configuration({"BLOCK": 1024}, warps=4, stages=1)},
    "loss_record": {("default", ANY_SIZE): Configuration({"BLOCK": 4096}, warps=8, stages=1)},
    "loss_share": {("default", ANY_SIZE): Configuration({"BLOCK": 4096}, warps=8, stages=1)},
    "record_share": {("default", ANY_SIZE): Configuration(warps=1, stages=1)},
    "square_sums": {("default", ANY_SIZE): Configuration({"BLOCK": 8192}, warps=8, stages=1)},
    "adam": {("default", ANY_SIZE): Configuration({"LINES": 32}, warps=4, stages=1)},
}
# Both kernels of the rank have one entry: a product of another shape could give an item another score.
CONFIGURATIONS["target_rank_added"] = CONFIGURATIONS["target_rank"]


_architectures: list[str] = []  # the names of the `as_architecture` blocks that are entered


def configuration(
    kernel: str, rows: int, dtype: torch.dtype, device: torch.device, embedding_dim: int = 0
) -> Configuration:
    """Return the table's entry for a launch.

    Args:
        kernel: a key of `CONFIGURATIONS`.
        rows: number of rows or items that the launch goes over.
        dtype: of the matrix products.
        device: where it runs; without CUDA the architecture is "default".
        embedding_dim: width of the rows, for kernels that hold whole rows; 0 for others.
    """
    return table_entry(kernel, _architecture(device), size_of(rows, dtype, embedding_dim))


def only_configuration(kernel: str, device: torch.device) -> Configuration:
    """Return the entry of a kernel that has one entry for all sizes and dtypes."""
    return table_entry(kernel, _architecture(device), ANY_SIZE)


@contextmanager
def as_architecture(name: str) -> Iterator[None]:
    """Choose the configurations of an architecture ("sm_90", "default") within the block, on any device."""
    _architectures.append(name)
    try:
        yield
    finally:
        _architectures.pop()


def _architecture(device: torch.device) -> str:
    """Return the architecture of a device ("sm_90"), or the one that `as_architecture` names."""
    if _architectures:
        return _architectures[-1]
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def size_of(rows: int, dtype: torch.dtype, embedding_dim: int = 0) -> str:
    """Return the size ("small", "large", "wide" or "fp32") of a launch."""
    if dtype == torch.float32:
        return "fp32"
    if rows <= SMALL_ROWS:
        return "small"
    return "wide" if embedding_dim > WIDE else "large"


def table_entry(kernel: str, architecture: str, size: str) -> Configuration:
    """Return the table's entry for an architecture ("sm_90") and a name in SIZES or ROW_SIZES, or ANY_SIZE."""
    entries = CONFIGURATIONS[kernel]
    return entries.get((architecture, size), entries["default", size])
