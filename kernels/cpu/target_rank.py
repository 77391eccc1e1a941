"""The rank of a target on a CPU in PyTorch: scores are computed and counted in tiles that fit a core's cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threads import at_once, cores
from ..types import AddedScores
from .score_tiles import ITEMS, STEP, USERS, TilePlaces, bounded, equal_parts


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the reference's two ranks, float64 [U]: without the excluded items, and among all items.

    The caller has checked the arguments; excluded is -1 for no item.

    Each thread takes a part of the users at a time. The tiles of all threads together have at most chunk_elements
    scores, but a tile has at least 48 x 48. All products have the same shape, also those of the targets, so that equal
    item vectors get exactly equal scores.

    Each score without what is added to it is counted first. The scores of the excluded items and of those with an added
    score are read from the tiles, and a second pass over these few corrects the counts.
    """
    threads = cores()
    users = len(queries)
    catalogue = len(items)
    most = max(STEP**2, chunk_elements // threads)  # scores in a tile
    height = equal_parts(users, min(USERS, int(most**0.5)), threads)
    width = max(height, equal_parts(catalogue, min(ITEMS, most // height)))
    finite = bounded(queries, items)
    items = F.pad(items, (0, 0, 0, -catalogue % width))

    def ranks(part: slice) -> Tensor:
        """Return both ranks [2, users] of the users in `part`."""
        users = queries[part]
        of_part = None if added is None else added.part(part.start, len(users))
        tile = _Tile(users, items, targets[part], excluded[part], height, width, of_part)
        for first in range(0, catalogue, width):
            tile.count(first, min(width, catalogue - first), finite)
        return tile.ranks(tie_share)

    parts = [slice(start, start + height) for start in range(0, max(1, users), height)]
    masked, unmasked = torch.cat(at_once(ranks, parts, threads), dim=1)
    return masked, unmasked


class _Tile:
    """The counts of one part of the users, over tiles of the catalogue."""

    def __init__(
        self,
        queries: Tensor,
        items: Tensor,
        targets: Tensor,
        excluded: Tensor,
        height: int,
        width: int,
        added: AddedScores | None,
    ) -> None:
        """Compute the targets' scores; items [N rounded up to width, d]; a tile is [height, width]."""
        self.users = len(queries)
        self.width = width
        self.items = items
        self.queries = F.pad(queries, (0, 0, 0, height - self.users))
        self.scores = queries.new_empty(height, width)
        # Flags are fp32 or fp64: adding up booleans takes longer than the product, and sums in half precision round.
        self.flags = self.scores.new_empty(height, width, dtype=torch.promote_types(queries.dtype, torch.float32))
        target_items = F.pad(items[targets], (0, 0, 0, width - self.users))
        self.target = torch.mm(self.queries, target_items.T, out=self.scores)[: self.users].diagonal()[:, None].clone()
        self.added = added
        self.higher, self.not_lower = torch.zeros(2, self.users, dtype=torch.float64)
        self.broken = torch.zeros(self.users, dtype=torch.bool)
        self.unreachable = (excluded == targets[:, None]).any(dim=1)
        self._list(excluded)
        if added is not None:
            users = torch.cat([torch.arange(self.users), self.excluded_users])
            wanted = torch.cat([targets, self.excluded_items])
            of_targets, self.added_to_excluded = added.values_of(users, wanted, len(items)).tensor_split([self.users])
            self.target += of_targets[:, None]

    def _list(self, excluded: Tensor) -> None:
        """Set the items whose scores are read from the tiles, and their places, sorted by tile.

        They are the excluded items, each once a user, then the items with an added score.
        """
        listed, _ = excluded.sort(dim=1)
        counted = listed >= 0
        counted[:, 1:] &= listed[:, 1:] != listed[:, :-1]
        users, items = counted.nonzero()[:, 0], listed[counted]
        self.excluded_users = users
        self.excluded_items = items
        if self.added is not None:
            users = torch.cat([users, self.added.users()])
            items = torch.cat([items, self.added.items])
        self.listed = TilePlaces(users, items, self.width, len(self.items) // self.width)
        self.read = self.scores.new_empty(len(items))

    def count(self, first: int, columns: int, finite: bool) -> None:
        """Count the items `first` to `first + columns - 1`; finite: no score can be infinite or NaN."""
        torch.mm(self.queries, self.items[first : first + self.width].T, out=self.scores)
        scores, flags = self.scores[: self.users, :columns], self.flags[: self.users, :columns]
        self.higher += torch.gt(scores, self.target, out=flags).sum(dim=1)
        self.not_lower += torch.ge(scores, self.target, out=flags).sum(dim=1)
        numbers, places = self.listed.of_tile(first // self.width)
        self.read.scatter_(0, numbers, self.scores.flatten().index_select(0, places))
        if not finite:
            self.broken |= ~scores.isfinite().all(dim=1)

    def ranks(self, tie_share: float) -> Tensor:
        """Return float64 [2, users]: the ranks without the excluded items, and among all items."""
        excluded_scores, base = self.read.tensor_split([len(self.excluded_users)])
        if self.added is not None:
            self._replace(base, self.added)
            excluded_scores += self.added_to_excluded
        ties = self.not_lower - self.higher - 1
        unmasked = (1 + self.higher + tie_share * ties).masked_fill(self.broken, float("nan"))
        target = self.target[self.excluded_users, 0]
        above = (excluded_scores > target) + tie_share * (excluded_scores == target)
        masked = unmasked.index_add(0, self.excluded_users, above.double(), alpha=-1)
        return torch.stack([masked.masked_fill(self.unreachable & ~self.broken, float("inf")), unmasked])

    def _replace(self, base: Tensor, added: AddedScores) -> None:
        """Replace the counts of the items with an added score, whose scores without it are `base` [E]."""
        lengths = added.offsets.diff()
        target = self.target[:, 0].repeat_interleave(lengths)
        total = base + added.values
        finite = total.isfinite()
        for counts, compare in ((self.higher, torch.gt), (self.not_lower, torch.ge)):
            changes = compare(total, target).view(torch.int8) - compare(base, target).view(torch.int8)
            counts += _sums(changes, added.offsets)
        if not finite.all():
            self.broken |= _sums(~finite, added.offsets) > 0


def _sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of values[offsets[u]:offsets[u + 1]] for each user u, int64 [U]."""
    upto = F.pad(values.cumsum(0, dtype=torch.int64), (1, 0))[offsets]
    return upto.diff()
