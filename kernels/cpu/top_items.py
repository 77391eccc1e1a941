"""The best items of users on a CPU in PyTorch: scores are computed and compared in tiles that fit a core's cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..score_keys import NO_ITEM, SCORE_DTYPES, best_of_keys, pack, unpack
from ..threads import at_once, cores
from ..types import AddedScores
from .score_tiles import ITEMS, STEP, USERS, TilePlaces, bounded, equal_parts

WORD = 8  # scores whose flags are read as one int64
FEW = 4  # a tile in which fewer than one in FEW words has a candidate is merged candidate by candidate
WIDEST = 16 * ITEMS  # items in a tile of few users


def refusal(queries: Tensor) -> str:
    """Return why this form does not take these queries, or "": a score and a row have to fit in 64 bits."""
    if queries.dtype in SCORE_DTYPES:
        return ""
    return f"it needs float32, bfloat16 or float16, found {queries.dtype}".replace("torch.", "")


def top_items(
    queries: Tensor,
    items: Tensor,
    count: int,
    excluded: Tensor,
    allowed: Tensor | None = None,
    chunk_elements: int = 1 << 24,
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the reference's rows int64 [U, K] and scores [U, K]; the caller has checked the arguments.

    Each thread takes a part of the users at a time, and the items in tiles by rising row. The tiles of all threads
    together have at most chunk_elements scores, but a tile has at least 48 users and the larger of 48 and 4 K items.
    All products have the same shape, so that equal item vectors get exactly equal scores.
    """
    threads = cores()
    users, catalogue = len(queries), len(items)
    best_count = min(count, catalogue)
    most = max(STEP**2, min(USERS * ITEMS, chunk_elements // threads))  # scores in a tile
    width = equal_parts(catalogue, max(min(ITEMS, math.isqrt(most)), 4 * best_count))
    height = equal_parts(users, min(USERS, most // width), threads)
    width = max(width, equal_parts(catalogue, min(WIDEST, most // height)))
    tiles = _ItemTiles(items.detach(), width, None if allowed is None else ~allowed)
    finite = bounded(queries, items, None if added is None else added.values)

    def best(part: slice) -> tuple[Tensor, Tensor]:
        """Return the keys of the best items of the users in `part`, and bool [U]: a score is not finite."""
        users = queries[part]
        of_part = None if added is None else added.part(part.start, len(users))
        search = _Search(users, tiles, best_count, excluded[part], height, of_part)
        for tile in range(tiles.count):
            search.merge(tile, finite)
        return search.best, search.broken

    parts = [slice(start, start + height) for start in range(0, max(1, users), height)]
    keys, broken = (torch.cat(of_parts) for of_parts in zip(*at_once(best, parts, threads)))
    return best_of_keys(keys, broken, count, queries.dtype)


class _ItemTiles:
    """The catalogue in tiles of one width; zeros fill the last one up."""

    def __init__(self, items: Tensor, width: int, left_out: Tensor | None) -> None:
        """Cut items [N, d]; left_out: bool [N], the items that are never returned."""
        self.items = items
        self.width = width
        self.count = -(-len(items) // width)
        last = (self.count - 1) * width
        self.last = F.pad(items[last:], (0, 0, 0, -len(items) % width)) if self.count else items
        self.left_out = [] if left_out is None else [part if part.any() else None for part in left_out.split(width)]

    def vectors(self, tile: int) -> Tensor:
        """Return the vectors [width, d] of a tile."""
        return self.last if tile == self.count - 1 else self.items[tile * self.width : (tile + 1) * self.width]

    def mask(self, tile: int, scores: Tensor) -> None:
        """Set the scores [U, width] of a tile to minus infinity for items that are left out or do not exist."""
        scores[:, len(self.items) - tile * self.width :] = -torch.inf
        if self.left_out and (left_out := self.left_out[tile]) is not None:
            scores[:, : len(left_out)].masked_fill_(left_out, -torch.inf)


class _Search:
    """The best items so far of one part of the users.

    A later tile has higher rows. So its items come among the best only with a score above the lowest of them: an equal
    one loses the tie.
    """

    def __init__(
        self, queries: Tensor, tiles: _ItemTiles, count: int, excluded: Tensor, height: int, added: AddedScores | None
    ) -> None:
        """Prepare a tile of `height` users, of which queries [U, d] fill the first."""
        self.users = len(queries)
        self.tiles = tiles
        self.queries = F.pad(queries, (0, 0, 0, height - self.users))
        self.scores = queries.new_empty(height, tiles.width)
        self.flags = torch.empty(height, tiles.width, dtype=torch.bool)
        self.added = added
        if added is not None:
            self.added_places = TilePlaces(added.users(), added.items, tiles.width, tiles.count)
        users, columns = (excluded >= 0).nonzero(as_tuple=True)
        self.excluded_places = TilePlaces(users, excluded[users, columns], tiles.width, tiles.count)
        self.best = torch.full((self.users, count), NO_ITEM)
        self.lowest = queries.new_full((self.users, 1), -torch.inf)  # score of the last of the best
        self.broken = torch.zeros(self.users, dtype=torch.bool)

    def merge(self, tile: int, finite: bool) -> None:
        """Bring the best items of a tile among the best; finite: no score can be infinite or NaN."""
        torch.mm(self.queries, self.tiles.vectors(tile).T, out=self.scores)
        scores, flags = self.scores[: self.users], self.flags[: self.users]
        flat = self.scores.view(-1)
        if self.added is not None:
            numbers, places = self.added_places.of_tile(tile)
            flat.index_add_(0, places, self.added.values.index_select(0, numbers))
        if not finite:
            self.broken |= ~scores.isfinite().all(dim=1)
        self.tiles.mask(tile, scores)
        flat.index_fill_(0, self.excluded_places.of_tile(tile)[1], -torch.inf)
        torch.gt(scores, self.lowest, out=flags)
        users, words = flags.view(torch.int64).nonzero(as_tuple=True)
        first = tile * self.tiles.width
        if len(users) * WORD * FEW < scores.numel():
            self._merge_few(users, words, first)
        else:
            keys = pack(scores, torch.arange(first, first + self.tiles.width))
            self._update(slice(None), torch.cat([self.best, keys], dim=1))

    def _merge_few(self, users: Tensor, words: Tensor, first: int) -> None:
        """Merge the candidates among scores that lie in words [P] of users [P], which ascend."""
        values = self.scores.view(len(self.scores), -1, WORD)[users, words]
        entries, places = (values > self.lowest[users]).nonzero(as_tuple=True)
        keys = pack(values[entries, places], first + words[entries] * WORD + places)
        changed, lengths = users[entries].unique_consecutive(return_counts=True)
        if not len(changed):
            return
        starts = lengths.cumsum(0) - lengths
        lines = torch.arange(len(changed)).repeat_interleave(lengths)
        columns = torch.arange(len(keys)) - starts[lines]
        best = self.best.shape[1]
        candidates = keys.new_full((len(changed), best + int(lengths.max())), NO_ITEM)
        candidates[:, :best] = self.best[changed]
        candidates[lines, best + columns] = keys
        self._update(changed, candidates)

    def _update(self, users: Tensor | slice, candidates: Tensor) -> None:
        """Replace the best of some users by the best of the candidates [users, at least K]."""
        best = candidates.topk(self.best.shape[1], dim=1).values
        self.best[users] = best
        self.lowest[users] = unpack(best[:, -1:], self.lowest.dtype)[1]
