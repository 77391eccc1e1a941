"""Find out if an encoder's states depend on the other items of a batch, and split batches so that they do not.

An encoder that takes no attention mask, or does not keep to it, lets the padding of a short text into its states. One
that shares a limited capacity among a batch lets in the other items themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .image_bytes import ModelInputs

TOGETHER = "any items"
EQUAL_LENGTHS = "texts of equal length"
SINGLE = "single items"
REASONS = {EQUAL_LENGTHS: "padding changes its hidden states", SINGLE: "hidden states depend on the rest of a batch"}
# The largest difference of a state, over the state's own norm, that rounding makes between batches of other sizes.
ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def allowed_batches(
    states: Callable[[ModelInputs], Tensor], batch: ModelInputs, alone: ModelInputs, unmixed: str
) -> str:
    """Return TOGETHER if the states of a batch's last item are those of the item alone; what may share a batch if not.

    states: calls the encoder on inputs, and returns a hidden state [N, tokens, D]. batch: unlike items. alone: its last
    item, without padding. unmixed: what may share a batch if the state of the item beside a similar one is right.
    """
    expected = states(alone)[0]
    if not _differ(states(batch)[-1, : len(expected)], expected):
        return TOGETHER
    similar = {name: torch.cat([tensor.flip(-1), tensor]) for name, tensor in alone.items()}
    return SINGLE if _differ(states(similar)[-1], expected) else unmixed


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return the rows of each length, the longest first; rows keep their order."""
    rows_by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows_by_length.setdefault(length, []).append(row)
    return [rows_by_length[length] for length in sorted(rows_by_length, reverse=True)]


def run_groups(groups: Sequence[Sequence[int]], run: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Call `run` on the rows of each group, and return its results in the order of the rows.

    groups: every row once. run: from row numbers int64 [n], on the CPU, to tensors [n, ...].
    """
    results = [run(torch.tensor(rows)) for rows in groups]
    places = torch.tensor([row for rows in groups for row in rows]).argsort()
    return [torch.cat(parts).index_select(0, places.to(parts[0].device)) for parts in zip(*results)]


def _differ(states: Tensor, expected: Tensor) -> bool:
    """Return True if states of the same tokens, [tokens, D] each, differ by more than rounding in their dtype."""
    difference = states.float() - expected.float()
    return bool(difference.norm() > ROUNDING[expected.dtype] * expected.float().norm())
