"""Gather rows from all ranks in a step by autograd, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks


def gathered(rows: Tensor, count: int, ranks: Ranks) -> Tensor:
    """Return the blocks of all ranks, one after the other, [count, d]. rows: this rank's block [n, d], or more rows.

    The gradient of a row is the sum of the gradients that all ranks have for it; a row beyond the block gets 0.
    """
    return _Gathered.apply(rows, count, ranks) if ranks.several else rows


class _Gathered(torch.autograd.Function):
    """The gathering, whose backward adds up over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, ranks: Ranks) -> Tensor:
        """Gather the blocks."""
        ctx.ranks = ranks
        ctx.rows = len(rows)
        return ranks.gather_blocks(rows.detach(), count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the gradients of this rank's block."""
        block = ctx.ranks.add_blocks(gradient.contiguous())
        rows = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        taken = min(ctx.rows, len(block))
        rows[:taken] = block[:taken]
        return rows, None, None
