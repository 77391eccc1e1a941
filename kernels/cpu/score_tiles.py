"""Tiles of scores, users by items, on a CPU: their sizes, and the places of single scores in them."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 48  # tile sizes are multiples of this: at an odd edge some libraries add up a product in another order
USERS, ITEMS = 16 * STEP, 16 * STEP  # size of the largest tile


class TilePlaces:
    """The places of single scores in the tiles of a part of the users, sorted by tile."""

    def __init__(self, users: Tensor, items: Tensor, width: int, tiles: int) -> None:
        """Sort the scores of users[i] for items[i], int64 [M]; a tile has `width` items."""
        of_items = items // width
        # A stable sort of narrow numbers is a radix sort, several times as fast.
        sorted_tiles, self.order = of_items.to(torch.int16 if tiles < 1 << 15 else torch.int64).sort(stable=True)
        places = users * width + (items - of_items * width)  # index into a flat tile
        self.places = places[self.order]
        numbers = torch.arange(tiles, dtype=sorted_tiles.dtype)
        self.ends = torch.searchsorted(sorted_tiles, numbers, right=True).tolist()

    def of_tile(self, tile: int) -> tuple[Tensor, Tensor]:
        """Return the numbers i of the scores in a tile, and their indices into the flat tile."""
        here = slice(self.ends[tile - 1] if tile else 0, self.ends[tile])
        return self.order[here], self.places[here]


def equal_parts(count: int, most: int, multiple: int = 1) -> int:
    """Return the size of the parts into which to cut `count` rows: equal, a multiple of `STEP`, at most about `most`.

    The size is chosen for a number of parts that is a multiple of `multiple`, such as the number of threads. It is at
    least `STEP`, so there may be fewer parts.
    """
    most = max(1, most // STEP) * STEP
    parts = -(-count // (most * multiple)) * multiple
    return max(1, -(-count // max(1, parts) // STEP)) * STEP


def bounded(queries: Tensor, items: Tensor, values: Tensor | None = None) -> bool:
    """Return True if no score can overflow: a bound of them all is less than half of the dtype's maximum.

    By Cauchy-Schwarz a product is at most the product of the norms; `values` are added to scores. Returns False if a
    number is not finite.
    """
    if not len(queries) or not len(items):
        return True
    bound = _longest(queries) * _longest(items)
    if values is not None and len(values):
        bound += max(abs(bound.item()) for bound in values.aminmax())
    return bound < torch.finfo(queries.dtype).max / 2


def _longest(vectors: Tensor) -> float:
    """Return the largest norm of the rows of a matrix, NaN if a number is NaN; float16 is too narrow for it."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return torch.linalg.vector_norm(vectors, dim=1, dtype=wide).max().item()
