"""Give recommendations to a Python caller as lists of named tuples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .growing.catalogue import Catalogue
from .recommendation import Recommended


class RankedItem(NamedTuple):
    """An item with its score."""

    item_id: str
    score: float
    title: str | None  # None for a run without titles


def ranked_lists(recommended: Iterable[Recommended], catalogue: Catalogue) -> list[list[RankedItem]]:
    """Return the items of each user, best first. A list is shorter where fewer items are left."""
    return [
        ranked_items(items, scores, catalogue)
        for part in recommended
        for items, scores in zip(part.items.tolist(), part.scores.tolist())
    ]


def ranked_items(items: list[int], scores: list[float], catalogue: Catalogue) -> list[RankedItem]:
    """Return items with their scores. items: numbers; places with 0, behind the last item, are left out."""
    titles = catalogue.titles
    return [
        RankedItem(catalogue.item_ids[item - 1], score, None if titles is None else titles[item - 1])
        for item, score in zip(items, scores)
        if item
    ]
