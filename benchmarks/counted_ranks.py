"""Count the bytes that a rank receives in the exchanges of a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..ranks import Ranks


@dataclass(frozen=True)
class CountedRanks(Ranks):
    """The ranks of a job, with the bytes that this rank has received from the others by each method.

    Sums over ranks are counted as a ring exchanges them: all but one block for `add_blocks`, twice that for `add_up`.
    """

    received: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, ranks: Ranks, received: Counter[str] | None = None) -> CountedRanks:
        """Return the same ranks, counted. received: the counts to add to."""
        return cls(**vars(ranks), received=Counter() if received is None else received)

    def apart(self) -> CountedRanks:
        """Return the same ranks with channels of their own, whose bytes are counted together with these."""
        plain = Ranks(**{name: value for name, value in vars(self).items() if name != "received"})
        return CountedRanks.of(plain.apart(), self.received)

    def gather_blocks(self, rows: Tensor, count: int) -> Tensor:
        """Return the blocks of all ranks."""
        whole = super().gather_blocks(rows, count)
        self.received["gather_blocks"] += whole.nbytes - whole[self.block(count)].nbytes
        return whole

    def add_blocks(self, rows: Tensor) -> Tensor:
        """Return this rank's block of the sum of all ranks' rows."""
        block = super().add_blocks(rows)
        self.received["add_blocks"] += (self.count - 1) * block.nbytes
        return block

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks."""
        self.received["add_up"] += 2 * (self.count - 1) * tensor.nbytes // self.count
        return super().add_up(tensor)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to all ranks, and return those that came from them."""
        arrived = super().exchange(rows, sent, received)
        of_others = sum(received) - received[self.rank]
        self.received["exchange"] += of_others * arrived[:1].nbytes if of_others else 0
        return arrived
