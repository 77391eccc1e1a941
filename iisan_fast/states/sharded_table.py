"""Hold a table of hidden states in shards: each rank has the rows of some items, and sends them to the others.

Item i is the row i // N of rank i % N, for N ranks, so that every rank has as many, whatever the order of the
catalogue. Row 0 of rank 0 is padding.

Each gathering exchanges three times: how many rows each rank wants of each other one, their numbers, and the rows. All
of it goes between host memories, over Gloo and channels of its own. So it disturbs neither the step that computes
meanwhile nor its collectives, on a GPU too. The ranks may want any items; the table does not know how a batch is
shared. The numbers are 4 bytes beside thousands for a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ranks import Ranks
from .gathered_table import GatheredTable
from .item_source import Gathered
from .standardise import StateStatistics, state_statistics
from .view_shapes import ViewShape


def shard_rows(items: int, ranks: Ranks) -> int:
    """Return the number of rows of this rank's shard, of a catalogue of so many items and the padding."""
    return len(range(ranks.rank, items + 1, ranks.count))


def shard_items(items: int, ranks: Ranks) -> Tensor:
    """Return the numbers of the items whose rows this rank holds, ascending, int64, without padding."""
    return torch.arange(ranks.rank or ranks.count, items + 1, ranks.count)


class ShardedTable(GatheredTable):
    """A table whose rows lie in the host memories of several ranks.

    Every rank calls `gather` and `read` equally often, in the same order, for any items and also for none.
    """

    def __init__(self, views: tuple[Tensor, ...], items: int, device: torch.device, ranks: Ranks) -> None:
        """Take this rank's shard [shard rows, K, D] of each view, and open channels to the other ranks.

        items: of the whole catalogue. device: that rows are copied to. Every rank calls it.
        """
        shapes = [ViewShape(view.shape[1], view.shape[2]) for view in views]
        super().__init__(shapes, [view.dtype for view in views], items + 1, device)
        self.views = views
        self.ranks = ranks.apart()

    def standardise(self, names: Sequence[str], places: Sequence[str]) -> None:
        """Standardise the rows of all ranks, in place. Every rank calls it.

        names: of the views. places: of the views, for messages. Raises InputError, on all ranks, if a number is not
        finite.
        """
        first = self.gather(torch.ones(1, dtype=torch.int64)).tensors  # of item 1, on all ranks
        statistics: dict[str, StateStatistics] = {}
        for name, where, view, shift in zip(names, places, self.views, first):
            rows = view if self.ranks.rank else view[1:]  # without padding
            statistics[name] = state_statistics([rows], view.dtype, where, shift[0], self.ranks)
            statistics[name].standardise(rows)
        self.statistics: Mapping[str, StateStatistics] = statistics

    def gather(self, items: Tensor) -> Gathered:
        """Return the rows of item numbers int64 [N] in host memory, pinned for CUDA: a tensor [N, K, D] for each view.

        Padding (0) may stand anywhere. Every rank calls it, with other items.
        """
        holders = items % self.ranks.count
        order = holders.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))  # of each item among the rows as they arrive
        wanted = holders.bincount(minlength=self.ranks.count)
        ones = [1] * self.ranks.count
        sent = self.ranks.exchange(wanted, ones, ones).tolist()
        received = wanted.tolist()
        numbers = (items[order] // self.ranks.count).int()
        rows = self.ranks.exchange(numbers, received, sent)
        buffers = self._buffers(len(items))
        for view, buffer in zip(self.views, buffers):
            arrived = self.ranks.exchange(view.index_select(0, rows), sent, received)
            torch.index_select(arrived, 0, places, out=buffer)
        return Gathered(buffers)

    def close(self) -> None:
        """Do nothing: the table keeps no files open."""
