"""Choose the items that a batch's loss compares each target with: its columns.

They are the batch's items, all items that occur in training, or the batch's and negatives drawn for the step. A hash of
the seed and the step number draws these, so they depend neither on the order of the work nor on where a run goes on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..config import TrainConfig
from .epoch_plan import Bounds, Layout
from .sequences import Sequences

GOLDEN = 0x9E3779B97F4A7C15  # the step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)


class Negatives(NamedTuple):
    """The items that a loss compares targets with. The default is the in-batch loss with its mask."""

    catalogue: bool = False  # all items that occur in training
    sampled: int = 0  # so many of them, drawn for each step; 0: none are drawn
    seed: int = 0  # of the draws
    own_mask: bool = True  # leave out the items of the row's user

    @classmethod
    def of(cls, train: TrainConfig) -> Negatives:
        """Return the negatives of a run's loss."""
        kind, drawn = train.loss_and_negatives
        return cls(kind == "full", drawn, train.seed, train.own_mask)

    @property
    def in_batch(self) -> bool:
        """Return True if the batch's own items, as often as they occur in it, are the negatives."""
        return not self.catalogue and not self.sampled


IN_BATCH = Negatives()


class Columns(NamedTuple):
    """The columns of the losses of B batches, V in all."""

    items: np.ndarray  # int64 [V]: item numbers, ascending in each batch
    bounds: np.ndarray  # [B + 1]: where the columns of each batch start, then V
    slots: np.ndarray  # int64 [S]: the item of each slot of the layout, an index into its batch's columns
    multiplicity: np.ndarray  # int64 [V]: how often a column counts
    barred: list[np.ndarray]  # of each batch: columns that are negatives of no row, ascending


def possible_negatives(sequences: Sequences) -> np.ndarray:
    """Return the numbers of the items that occur in training, ascending, int64.

    An item that does not occur is never a target, so a loss could only lower its scores, of which nothing is known.
    """
    return np.flatnonzero(sequences.training_counts)


def loss_columns(layout: Layout, first_step: int, negatives: Negatives, possible: np.ndarray) -> Columns:
    """Return the columns of a layout's batches.

    first_step: the run's step number of the first batch. possible: from `possible_negatives`. Raises ValueError if more
    negatives are drawn than there are.
    """
    if negatives.in_batch:
        counts = np.diff(layout.occurrences)
        nothing = [np.zeros(0, dtype=np.int64)] * layout.batches
        return Columns(layout.distinct, layout.distinct_bounds, layout.slot_distinct, counts, nothing)
    columns = []
    slots = np.empty_like(layout.slot_distinct)
    barred = []
    for batch in range(layout.batches):
        distinct = layout.distinct[slice(*layout.distinct_bounds[batch : batch + 2])]
        here = slice(*layout.slot_bounds[batch : batch + 2])
        drawn = possible
        if negatives.sampled:
            drawn = possible[drawn_places(negatives.seed, first_step + batch, negatives.sampled, len(possible))]
        joined = drawn if len(drawn) == len(possible) else np.union1d(distinct, drawn)
        columns.append(joined)
        slots[here] = np.searchsorted(joined, distinct)[layout.slot_distinct[here]]
        barred.append(np.flatnonzero(~np.isin(joined, drawn, assume_unique=True)))
    bounds = np.cumsum([0, *map(len, columns)])
    return Columns(np.concatenate(columns), bounds, slots, np.ones(bounds[-1], dtype=np.int64), barred)


def drawn_places(seed: int, step: int, count: int, places: int) -> np.ndarray:
    """Return `count` distinct numbers from 0 to below `places`, uniformly drawn, ascending, int64 [count].

    Each number has a hash of (seed, step, number), and those of the least hashes are drawn. Raises ValueError if
    `count` is more than `places`.
    """
    if count > places:
        raise ValueError(f"negatives: expected at most {places}, the items that occur in training, found {count}")
    if count == places:
        return np.arange(places)
    prefix = _mixed(_mixed(np.uint64(seed)) ^ np.uint64(step))
    with np.errstate(over="ignore"):
        hashes = _mixed(prefix + np.arange(1, places + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return np.sort(np.argpartition(hashes, count)[:count])


def widened(bounds: Bounds, negatives: Negatives, sequences: Sequences) -> Bounds:
    """Return the upper limits of batches whose columns are those of a loss."""
    if negatives.in_batch:
        return bounds
    items = len(possible_negatives(sequences))
    distinct = items if negatives.catalogue else min(items, bounds.distinct + negatives.sampled)
    return bounds._replace(distinct=-(-distinct // 32) * 32)


def _mixed(numbers: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """Mix the bits of 64-bit numbers, one to one, with SplitMix64's final steps."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
