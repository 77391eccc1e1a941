"""The public ops: arguments checked, a backend chosen, the reference or Triton called.

Importing this needs no Triton; the first op that Triton runs imports it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import check_loss, check_ranks, check_towers
from .reference import States, Tower

BACKEND_VARIABLE = "IISAN_FAST_BACKEND"
BACKENDS = ("auto", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger("iisan_fast.kernels")


def side_towers(
    states: Sequence[States], towers: Sequence[Tower], activation: str = "relu", backend: str = "auto"
) -> list[Tensor]:
    """The towers of a side network, all of one shape (K, R, D), each over one or both of the views.

    SANB(x) = x + W_up act(W_down x + b_down) + b_up and g = sigmoid(gate / 0.1), from s = 0 (IISAN, equations 2-4):
    one view: s = SANB_k(g_k h_k + (1 - g_k) s); both: s = SANB_k(s + g_k first_k + (1 - g_k) second_k).

    Args: states: one or two views, tables [M, K, D] read by row; towers: their parameters, shaped as
    `reference.side_tower` says; activation "relu" or "gelu". By Triton, tables of bf16 or fp16 are multiplied in their
    dtype and added up in fp32; fp32 as torch.set_float32_matmul_precision says. Returns [N, D] a tower, in the
    weights' dtype, differentiable in the parameters and in views read in order. Raises ValueError for bad arguments.
    """
    check_towers(states, towers, activation)
    tensors = [view.table for view in states] + [towers[0].down_weight]
    if _use_triton("side_towers", backend, tensors):
        from . import side_network

        return side_network.side_towers(states, towers, activation)
    return reference.side_towers(states, towers, activation)


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None = None,
    history_bits: Tensor | None = None,
    log_multiplicity: Tensor | None = None,
    log_popularity: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Debiased in-batch cross-entropy over the distinct items of a batch (IISAN, equation 5, duplicates merged).

    Arguments and formula as `reference.row_losses`; without row_users and history_bits nothing is masked, without
    log_popularity nothing is debiased. reduction "mean" gives a scalar, "none" the loss of each row [R]. By Triton
    the losses are fp32 and no logit is stored. Raises ValueError for bad arguments.
    """
    check_loss(queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected mean or none, found {reduction!r}")
    arguments = (queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity)
    if _use_triton("inbatch_cross_entropy", backend, [queries, items]):
        from . import cross_entropy

        losses = cross_entropy.row_losses(*arguments)
    else:
        losses = reference.row_losses(*arguments)
    return losses.mean() if reduction == "mean" else losses


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rank of each target in the full catalogue: 1 + items that score higher + tie_share of the others that tie.

    Arguments and results as `reference.target_rank`; Triton holds no scores, so chunk_elements bounds nothing there.
    Raises ValueError for bad arguments.
    """
    check_ranks(queries, items, targets, excluded)
    if _use_triton("target_rank", backend, [queries, items]):
        from . import rank

        return rank.target_rank(queries, items, targets, excluded, tie_share)
    return reference.target_rank(queries, items, targets, excluded, tie_share, chunk_elements)


def check_backend(device: torch.device) -> None:
    """Raises ValueError where the backend that the environment names cannot run on the device."""
    _choice("the kernels", "auto", [torch.empty(0, device=device)])


def _use_triton(op: str, backend: str, tensors: Sequence[Tensor]) -> bool:
    """Whether Triton runs this op; says so once."""
    chosen, reason = _choice(op, backend, tensors)
    if not torch.compiler.is_compiling():
        _report("triton" if chosen else "torch", tensors[0].device.type, reason)
    return chosen


def _choice(op: str, backend: str, tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """Whether Triton runs this op, and why it cannot on CUDA. What was asked for by name is refused, never replaced."""
    source = "backend"
    if backend == "auto" and (named := os.environ.get(BACKEND_VARIABLE)):
        source, backend = BACKEND_VARIABLE, named
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected {', '.join(BACKENDS)}, found {backend!r}")
    device = tensors[0].device.type
    unable = _why_not(device, tuple(tensor.dtype for tensor in tensors))
    if backend == "triton" and unable:
        raise ValueError(f"{source}: triton cannot run {op}: {unable}; use torch")
    chosen = backend == "triton" or (backend == "auto" and device == "cuda" and not unable)
    return chosen, unable if device == "cuda" and not chosen else ""


@functools.cache
def _why_not(device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """What keeps Triton from running an op on these tensors, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), found {device}"
    if wrong := [dtype for dtype in dtypes if dtype not in TRITON_DTYPES]:
        return f"it needs float32, bfloat16 or float16, found {wrong[0]}".replace("torch.", "")
    return ""


@functools.cache
def _report(chosen: str, device: str, reason: str) -> None:
    """Says once what runs the ops."""
    log.info("kernels: %s on %s%s", chosen, device, f" ({reason})" if reason else "")
