"""What workers found apart, added up by C++: `cpp/sums.cpp`, shared out among the cores."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from .native import library, share_out

MOST_NUMBERS = 1 << 16  # of a call


def add_up(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Adds the tensors of each list to its first, in order; returns the firsts.

    All are contiguous and of one dtype, fp32 or fp64.
    """
    totals = [own[0] for own in parts]
    for i in range(1, max(map(len, parts))):
        sums = [_Sum(*piece) for own in parts if i < len(own) for piece in _pieces(own[0], own[i])]
        share_out(library(totals[0].dtype).add_up, sums, totals[0].dtype)
    return totals


class _Sum(ctypes.Structure):
    """`Sum` of cpp/sums.cpp."""

    _fields_ = [("total", ctypes.c_void_p), ("part", ctypes.c_void_p), ("count", ctypes.c_int64)]


def _pieces(total: Tensor, part: Tensor) -> list[tuple[int, int, int]]:
    """(address in the total, address in the part, numbers) of each call."""
    count, size = total.numel(), total.element_size()
    starts = range(0, count, MOST_NUMBERS)
    to, of = total.data_ptr(), part.data_ptr()
    return [(to + start * size, of + start * size, min(MOST_NUMBERS, count - start)) for start in starts]
