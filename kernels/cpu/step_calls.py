"""The schedule and the batch that the ops of a training step on a CPU share.

An op allocates its memory once, for batches up to a size. For each batch it divides the work anew and sets its calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import RecommenderBatch
from .library import library
from .schedule import AT_ONCE, Schedule, Span
from .sums import add_sums


class StepCalls:
    """The schedule of a step, the sizes of its memory, and the current batch."""

    batch: RecommenderBatch  # set while the step runs

    def __init__(self, dtype: torch.dtype, items: int, rows: int, encoded: int) -> None:
        """Create an empty schedule.

        dtype: of the weights. items, rows: the largest batch that the memory holds. encoded: the most items of it whose
        states there are.
        """
        self.dtype = dtype
        self.items = items
        self.rows = rows
        self.encoded = encoded
        self.schedule = Schedule(dtype)
        self._library = library(dtype)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of the weights' dtype."""
        return torch.empty(shape, dtype=self.dtype, device="cpu")

    def add(self, function: str, arguments: Sequence[ctypes.Structure], after: Span = AT_ONCE) -> Span:
        """Schedule a C++ call for each of the arguments, after the calls `after` have ended; return the calls."""
        return self.schedule.add(getattr(self._library, function), arguments, after)

    def add_sums(self, addresses: Sequence[int], count: int, after: Span = AT_ONCE) -> Span:
        """Schedule the addition of `count` numbers at each further address to the first; return the last calls."""
        return add_sums(self.schedule, addresses, count, self.dtype, after)


@dataclass
class Output:
    """A tensor that one op writes and another reads, and the calls after which it is complete."""

    tensor: Tensor
    done: Span = AT_ONCE


class GradientParts:
    """Gradients that are views of one flat buffer, and parts of the same layout for further workers to write."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Check the layout. Raises ValueError if the gradients are not views of one buffer, in this order."""
        first, last = gradients[0], gradients[-1]
        self._dtype = first.dtype
        self._parts = []
        self._first = first.data_ptr()
        self._offsets = [gradient.data_ptr() - self._first for gradient in gradients]
        ends = [offset + gradient.nbytes for offset, gradient in zip(self._offsets, gradients)]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        if len(storages) > 1 or any(end > start for end, start in zip(ends, self._offsets[1:])):
            raise ValueError("gradients: expected views of one flat buffer, one after the other")
        self._count = (last.data_ptr() - self._first) // self._dtype.itemsize + last.numel()

    def places(self, part: int) -> list[int]:
        """Return the addresses for a part's gradients; part 0 is the gradients, others are allocated at first use."""
        while len(self._parts) < part:  # zeros, because the gaps between the gradients are added up too
            self._parts.append(torch.zeros(self._count, dtype=self._dtype, device="cpu"))
        first = self._parts[part - 1].data_ptr() if part else self._first
        return [first + offset for offset in self._offsets]

    def add_up(self, calls: StepCalls, parts: int, after: Span) -> Span:
        """Schedule the addition of parts 1 to `parts` - 1 to the gradients, after the calls `after`; return it."""
        return calls.add_sums([self._first, *addresses(self._parts[: parts - 1])], self._count, after)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return the address of each tensor's first number."""
    return [tensor.data_ptr() for tensor in tensors]
