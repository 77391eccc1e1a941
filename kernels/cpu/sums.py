"""Add up the partial sums of several workers in C++ (`cpp/sums.cpp`), on all cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import library
from .schedule import AT_ONCE, Schedule, Span
from .structs import SumStruct

MOST_NUMBERS = 1 << 16  # numbers that one call adds up


def add_up(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Add the tensors of each list to its first tensor, in place and in order; return the first tensors.

    All tensors are contiguous and of one dtype, fp32 or fp64; those of a list have one shape.
    """
    totals = [tensors[0] for tensors in parts]
    schedule = Schedule(totals[0].dtype)
    for tensors in parts:
        add_sums(schedule, [tensor.data_ptr() for tensor in tensors], tensors[0].numel(), totals[0].dtype)
    schedule.run()
    return totals


def add_sums(
    schedule: Schedule, addresses: Sequence[int], count: int, dtype: torch.dtype, after: Span = AT_ONCE
) -> Span:
    """Schedule the calls that add `count` numbers at each further address to those at the first, in order.

    The calls wait for the calls `after`. Returns the last calls, or `after` if there is only one address.
    """
    total = addresses[0]
    size = dtype.itemsize
    for part in addresses[1:]:
        pieces = [(i * size, min(MOST_NUMBERS, count - i)) for i in range(0, count, MOST_NUMBERS)]
        calls = [SumStruct(total + start, part + start, length) for start, length in pieces]
        after = schedule.add(library(dtype).add_up, calls, after)
    return after
