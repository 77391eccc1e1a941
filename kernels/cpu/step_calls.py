"""The schedule and the batch that the pairs of a training step on a CPU share.

A pair's memory is made once, with room for batches up to a size; its calls point there, and are cut anew for a batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import RecommenderBatch
from .library import AT_ONCE, Schedule, Span, library
from .sums import add_sums


class StepCalls:
    """The schedule of a step, the room of its memory, and its batch."""

    batch: RecommenderBatch  # of this step

    def __init__(self, dtype: torch.dtype, items: int, rows: int) -> None:
        """items, rows: the most of a batch that there is room for."""
        self.dtype, self.items, self.rows = dtype, items, rows
        self.schedule, self._library = Schedule(dtype), library(dtype)

    def empty(self, *shape: int) -> Tensor:
        """Return memory of the weights' dtype."""
        return torch.empty(shape, dtype=self.dtype, device="cpu")

    def add(self, function: str, arguments: Sequence[ctypes.Structure], after: Span = AT_ONCE) -> Span:
        """Schedule a call of the library's function for each of the arguments, once those of `after` have ended."""
        return self.schedule.add(getattr(self._library, function), arguments, after)

    def add_sums(self, addresses: Sequence[int], count: int, after: Span = AT_ONCE) -> Span:
        """Schedule the adding of `count` numbers at each address to those at the first, in order."""
        return add_sums(self.schedule, addresses, count, self.dtype, after)


@dataclass
class Output:
    """A tensor that one pair writes and another reads, and the calls of this step after which it is written."""

    tensor: Tensor
    done: Span = AT_ONCE


class GradientParts:
    """Gradients that stand one after the other in a flat buffer; more workers write parts of the same layout."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Raises ValueError if the gradients do not stand in this order in one buffer."""
        first, last = gradients[0], gradients[-1]
        self._dtype, self._parts = first.dtype, []
        self._first = first.data_ptr()
        self._offsets = [gradient.data_ptr() - self._first for gradient in gradients]
        ends = [offset + gradient.nbytes for offset, gradient in zip(self._offsets, gradients)]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        if len(storages) > 1 or any(end > start for end, start in zip(ends, self._offsets[1:])):
            raise ValueError("gradients: expected views of one flat buffer, one after the other")
        self._count = (last.data_ptr() - self._first) // self._dtype.itemsize + last.numel()

    def places(self, part: int) -> list[int]:
        """Return where a part's gradients go: part 0 is the gradients themselves."""
        while len(self._parts) < part:  # zeros, also between the gradients
            self._parts.append(torch.zeros(self._count, dtype=self._dtype, device="cpu"))
        first = self._parts[part - 1].data_ptr() if part else self._first
        return [first + offset for offset in self._offsets]

    def add_up(self, calls: StepCalls, parts: int, after: Span) -> Span:
        """Schedule the adding of the parts but the first to the gradients."""
        return calls.add_sums([self._first, *addresses(self._parts[: parts - 1])], self._count, after)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return where each tensor begins."""
    return [tensor.data_ptr() for tensor in tensors]
