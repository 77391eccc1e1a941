"""The rank of a target on a CPU in PyTorch: scores are computed and counted in tiles that fit a core's cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threads import at_once, cores

STEP = 48  # tile sizes are multiples of this: at an odd edge some libraries add up a product in another order
USERS, ITEMS = 16 * STEP, 16 * STEP  # size of the largest tile


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
) -> tuple[Tensor, Tensor]:
    """Return the reference's two ranks, float64 [U]: without the excluded items, and among all items.

    The caller has checked the arguments; excluded is -1 for no item.

    Each thread takes a part of the users at a time. The tiles of all threads together have at most chunk_elements
    scores, but a tile has at least 48 x 48. All products have the same shape, also those of the targets, so that equal
    item vectors get exactly equal scores.
    """
    threads = cores()
    users = len(queries)
    catalogue = len(items)
    most = max(STEP**2, chunk_elements // threads)  # scores in a tile
    height = _equal_parts(users, min(USERS, int(most**0.5)), threads)
    width = max(height, _equal_parts(catalogue, min(ITEMS, most // height)))
    finite = _bounded(queries, items)
    items = F.pad(items, (0, 0, 0, -catalogue % width))

    def ranks(part: slice) -> Tensor:
        """Return both ranks [2, users] of the users in `part`."""
        tile = _Tile(queries[part], items, targets[part], excluded[part], height, width)
        for first in range(0, catalogue, width):
            tile.count(first, min(width, catalogue - first), finite)
        return tile.ranks(tie_share)

    parts = [slice(start, start + height) for start in range(0, max(1, users), height)]
    masked, unmasked = torch.cat(at_once(ranks, parts, threads), dim=1)
    return masked, unmasked


class _Tile:
    """The counts of one part of the users, over tiles of the catalogue."""

    def __init__(
        self, queries: Tensor, items: Tensor, targets: Tensor, excluded: Tensor, height: int, width: int
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
        self.higher, self.not_lower = torch.zeros(2, self.users, dtype=torch.float64)
        self.broken = torch.zeros(self.users, dtype=torch.bool)
        self.unreachable = (excluded == targets[:, None]).any(dim=1)
        self._list(excluded)

    def _list(self, excluded: Tensor) -> None:
        """Set the places of the excluded items' scores within their tiles, sorted by tile; each item once a user."""
        listed, _ = excluded.sort(dim=1)
        counted = listed >= 0
        counted[:, 1:] &= listed[:, 1:] != listed[:, :-1]
        users, items = counted.nonzero()[:, 0], listed[counted]
        tiles, order = (items // self.width).sort()
        self.excluded_users = users[order]
        self.excluded_places = self.excluded_users * self.width + items[order] % self.width  # index into a flat tile
        self.excluded_ends = tiles.bincount(minlength=len(self.items) // self.width).cumsum(0).tolist()
        self.excluded_scores = self.scores.new_empty(len(order))

    def count(self, first: int, columns: int, finite: bool) -> None:
        """Count the items `first` to `first + columns - 1`; finite: no score can be infinite or NaN."""
        torch.mm(self.queries, self.items[first : first + self.width].T, out=self.scores)
        scores, flags = self.scores[: self.users, :columns], self.flags[: self.users, :columns]
        self.higher += torch.gt(scores, self.target, out=flags).sum(dim=1)
        self.not_lower += torch.ge(scores, self.target, out=flags).sum(dim=1)
        tile = first // self.width
        here = slice(self.excluded_ends[tile - 1] if tile else 0, self.excluded_ends[tile])
        self.excluded_scores[here] = self.scores.flatten()[self.excluded_places[here]]
        if not finite:
            self.broken |= ~scores.isfinite().all(dim=1)

    def ranks(self, tie_share: float) -> Tensor:
        """Return float64 [2, users]: the ranks without the excluded items, and among all items."""
        ties = self.not_lower - self.higher - 1
        unmasked = (1 + self.higher + tie_share * ties).masked_fill(self.broken, float("nan"))
        target = self.target[self.excluded_users, 0]
        above = (self.excluded_scores > target) + tie_share * (self.excluded_scores == target)
        masked = unmasked.index_add(0, self.excluded_users, above.double(), alpha=-1)
        return torch.stack([masked.masked_fill(self.unreachable & ~self.broken, float("inf")), unmasked])


def _equal_parts(count: int, most: int, multiple: int = 1) -> int:
    """Return the size of the parts into which to cut `count` rows: equal, a multiple of `STEP`, at most about `most`.

    The size is chosen for a number of parts that is a multiple of `multiple`, such as the number of threads. It is at
    least `STEP`, so there may be fewer parts.
    """
    most = max(1, most // STEP) * STEP
    parts = -(-count // (most * multiple)) * multiple
    return max(1, -(-count // max(1, parts) // STEP)) * STEP


def _bounded(queries: Tensor, items: Tensor) -> bool:
    """Return True if no score can overflow: the largest norms multiply to less than half of the dtype's maximum.

    By Cauchy-Schwarz a score is at most the product of the norms. Returns False if a number is not finite.
    """
    if not len(queries) or not len(items):
        return True
    longest = [vectors.double().norm(dim=1).max().item() for vectors in (queries, items)]
    return longest[0] * longest[1] < torch.finfo(queries.dtype).max / 2
