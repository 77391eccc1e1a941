"""Target rank on a CPU: tiles of scores that stay in its cache, counted as they come and never kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 48  # sizes of tiles are its multiples: at the ragged edge of a product some libraries add up in another order
USERS, ITEMS = 5 * STEP, 40 * STEP  # of a tile


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
) -> tuple[Tensor, Tensor]:
    """`reference.target_rank`; the caller has checked the arguments. chunk_elements bounds a tile, from 48 x 48.

    All products have one shape, the targets' own included, so that equal vectors score alike to the last bit.
    """
    users, catalogue = len(queries), len(items)
    height = min(USERS, _whole_steps(chunk_elements**0.5))
    width = max(height, min(ITEMS, _whole_steps(chunk_elements // height)))
    items = F.pad(items, (0, 0, 0, -catalogue % width))
    finite = _bounded(queries, items)
    ranks = queries.new_empty(2, users, dtype=torch.float64)
    for start in range(0, users, height):
        part = slice(start, min(start + height, users))
        tile = _Tile(queries[part], items, targets[part], excluded[part], height, width)
        for first in range(0, catalogue, width):
            tile.count(first, min(width, catalogue - first), finite)
        ranks[:, part] = tile.ranks(tie_share)
    return ranks[0], ranks[1]


class _Tile:
    """A few users against the catalogue, tile by tile."""

    def __init__(
        self, queries: Tensor, items: Tensor, targets: Tensor, excluded: Tensor, height: int, width: int
    ) -> None:
        self.users, self.width, self.items, self.targets = len(queries), width, items, targets[:, None]
        self.queries = F.pad(queries, (0, 0, 0, height - self.users))
        self.scores, self.flags = (queries.new_empty(height, width) for _ in range(2))
        own = F.pad(items[targets], (0, 0, 0, width - self.users))
        self.target = torch.mm(self.queries, own.T, out=self.scores)[: self.users].diagonal()[:, None].clone()
        listed, _ = excluded.sort(dim=1)  # an excluded item is counted once however often the history repeats it
        counted = (listed >= 0) & (listed != self.targets)
        counted[:, 1:] &= listed[:, 1:] != listed[:, :-1]
        self.listed, self.counted = listed, counted
        self.excluded = (excluded == self.targets).any(dim=1)
        self.higher, self.not_lower, self.own_higher, self.own_ties = queries.new_zeros(
            4, self.users, dtype=torch.float64
        )
        self.broken = torch.zeros(self.users, dtype=torch.bool)

    def count(self, first: int, columns: int, finite: bool) -> None:
        """Adds up the items from number `first` on, `columns` of them."""
        torch.mm(self.queries, self.items[first : first + self.width].T, out=self.scores)
        scores, flags = self.scores[: self.users, :columns], self.flags[: self.users, :columns]
        # Flags in the scores' dtype: adding up booleans takes longer than the product.
        self.higher += torch.gt(scores, self.target, out=flags).sum(dim=1)
        self.not_lower += torch.ge(scores, self.target, out=flags).sum(dim=1)
        here = self.counted & (self.listed >= first) & (self.listed < first + columns)
        own = scores.gather(1, (self.listed - first).clamp(0, columns - 1))
        self.own_higher += (here & (own > self.target)).sum(dim=1)
        self.own_ties += (here & (own == self.target)).sum(dim=1)
        if not finite:
            self.broken |= ~scores.isfinite().all(dim=1)

    def ranks(self, tie_share: float) -> Tensor:
        """float64 [2, users]: without the excluded items, and among all."""
        ties = self.not_lower - self.higher - 1
        unmasked = (1 + self.higher + tie_share * ties).masked_fill(self.broken, float("nan"))
        masked = unmasked - self.own_higher - tie_share * self.own_ties
        return torch.stack([masked.masked_fill(self.excluded & ~self.broken, float("inf")), unmasked])


def _whole_steps(size: float) -> int:
    """The largest multiple of the step that is not above the size; at least one."""
    return max(1, int(size) // STEP) * STEP


def _bounded(queries: Tensor, items: Tensor) -> bool:
    """Whether no score can leave the range of its dtype (Cauchy and Schwarz); False where a number is not finite."""
    if not len(queries) or not len(items):
        return True
    longest = [vectors.double().norm(dim=1).max().item() for vectors in (queries, items)]
    return longest[0] * longest[1] < torch.finfo(queries.dtype).max / 2
