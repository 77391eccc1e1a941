"""Define the ranks of a job, the processes that train or rank together, and what they exchange.

Every rank calls every method that exchanges data, in the same order. A job of one process, `ALONE`, exchanges nothing.
Rows are shared out in blocks of equal size, in the order of the ranks, so that the blocks of all ranks, one after the
other, are the whole. The last blocks may be smaller, or empty.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")
RAISED_ON_ALL = (InputError, OSError)  # what one rank alone may meet: bad input, and trouble with a file


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, and the place of this one among them."""

    rank: int = 0  # of this process, from 0
    count: int = 1
    on_this_machine: int = 1  # how many of them share this machine
    local_rank: int = 0  # of this process on its machine, from 0
    group: ProcessGroup | None = None  # whose members exchange data; None for all ranks

    @property
    def is_first(self) -> bool:
        """Return True on rank 0, which alone writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Return True if there is more than one rank."""
        return self.count > 1

    def block(self, count: int) -> slice:
        """Return this rank's block of `count` rows."""
        return self.blocks(count)[self.rank]

    def blocks(self, count: int) -> list[slice]:
        """Return the block of each rank among `count` rows."""
        size = self.block_size(count)
        return [slice(min(i * size, count), min((i + 1) * size, count)) for i in range(self.count)]

    def block_size(self, count: int) -> int:
        """Return the number of rows of the first block, which no other exceeds."""
        return -(-count // self.count)

    def apart(self, wait: timedelta | None = None) -> Ranks:
        """Return the same ranks with channels of their own, for exchanges in another thread. Every rank calls it.

        wait: the longest time that an exchange waits for the other ranks; None for that of the job.
        """
        if not self.several:
            return self
        from torch import distributed

        group = distributed.new_group(timeout=wait)
        return Ranks(self.rank, self.count, self.on_this_machine, self.local_rank, group)

    def gather_blocks(self, rows: Tensor, count: int) -> Tensor:
        """Return the blocks of all ranks, one after the other: [count, …]. rows: this rank's block, or more rows.

        The dtype may be any.
        """
        if not self.several:
            return rows[:count]
        size = self.block_size(count)
        block = rows.new_zeros(size, *rows.shape[1:])
        taken = min(size, len(rows))
        block[:taken] = rows[:taken]
        whole = rows.new_empty(size * self.count, *rows.shape[1:])
        self.gather_into(whole, block)
        return whole[:count]

    def gather_into(self, whole: Tensor, block: Tensor) -> None:
        """Write the blocks of all ranks, contiguous and of one shape, one after the other into `whole`.

        On CUDA a graph can capture it, and `add_into` and `add_up` too.
        """
        _collective("all_gather_single", "all_gather_into_tensor")(_bytes(whole), _bytes(block), group=self.group)

    def add_blocks(self, rows: Tensor) -> Tensor:
        """Return this rank's block of the sum of all ranks' rows. rows: [N, …], floating, of one shape on all ranks.

        The result has the size of the largest block; beyond the N rows it is 0.
        """
        if not self.several:
            return rows
        from torch.nn import functional

        size = self.block_size(len(rows))
        padding = [0, 0] * (rows.dim() - 1) + [0, size * self.count - len(rows)]
        whole = functional.pad(rows, padding)
        block = rows.new_empty(size, *rows.shape[1:])
        self.add_into(block, whole)
        return block

    def add_into(self, block: Tensor, whole: Tensor) -> None:
        """Write this rank's block of the sum of all ranks' `whole`, which has as many blocks as there are ranks."""
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(block, whole, group=self.group)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by its sum over all ranks, and return it. The sum has equal bits on all ranks."""
        if self.several:
            from torch import distributed

            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to all ranks, and return those that came from them, both in the order of the ranks.

        rows: [sum of sent, …], contiguous, of any dtype. sent, received: numbers of rows to and from each rank.
        """
        if not self.several:
            return rows
        from torch import distributed

        result = rows.new_empty(sum(received), *rows.shape[1:])
        distributed.all_to_all_single(_bytes(result), _bytes(rows), list(received), list(sent), group=self.group)
        return result

    def from_all(self, value: Any) -> list[Any]:
        """Return the value of each rank, a picklable object."""
        if not self.several:
            return [value]
        from torch import distributed

        values = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def to_first(self, value: Any) -> list[Any] | None:
        """Return the value of each rank, a picklable object, on rank 0; None on the others."""
        if not self.several:
            return [value]
        from torch import distributed

        values = [None] * self.count if self.is_first else None
        distributed.gather_object(value, values, dst=0, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the value of rank 0, a picklable object."""
        if not self.several:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def first_does(self, work: Callable[[], Result]) -> Result:
        """Call a function on rank 0 alone, and return its result on all ranks.

        Its InputError or OSError is raised on all ranks.
        """
        if not self.several:
            return work()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_first:
            try:
                outcome = (work(), None)
            except RAISED_ON_ALL as error:
                outcome = (None, error)
        result, failure = self.from_first(outcome)
        if failure is not None:
            raise failure
        return result

    def all_do(self, work: Callable[[], Result]) -> Result:
        """Call a function on all ranks, and return the result of this one.

        If it raises InputError or OSError on a rank, the one of the lowest such rank is raised on all. The message of
        an InputError names the rank and its machine, unless it is rank 0.
        """
        if not self.several:
            return work()
        result = failure = None
        try:
            result = work()
        except RAISED_ON_ALL as error:
            failure = error
        outcomes = self.from_all((failure, socket.gethostname()))
        for rank, (error, machine) in enumerate(outcomes):
            if isinstance(error, InputError) and rank > 0:
                raise InputError(f"rank {rank} on {machine}: {error}")
            if error is not None:
                raise error
        return result  # type: ignore[return-value]


ALONE = Ranks()


def _collective(name: str, older_name: str) -> Callable[..., Any]:
    """Return a function of torch.distributed, by the name that it has since torch 2.13 or by its older one."""
    from torch import distributed

    return getattr(distributed, name, None) or getattr(distributed, older_name)


def _bytes(rows: Tensor) -> Tensor:
    """Return a contiguous tensor [N, …] as bytes [N, bytes of a row], so that every dtype can be sent."""
    import torch

    numbers = math.prod(rows.shape[1:])  # not -1, which says nothing of no rows
    return rows.view(len(rows), numbers).view(torch.uint8)
