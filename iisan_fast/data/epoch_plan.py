"""An epoch's batches, laid out in windows of many batches at a time: one vectorised pass over a window's histories.

The order of an epoch depends on the seed and the epoch alone, so all its batches are known before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .sequences import Sequences


class Window(NamedTuple):
    """Batches of an epoch that follow one another."""

    users: np.ndarray  # int64: the users of all its batches, in order
    first_step: int  # the run's step number of its first batch


class Bounds(NamedTuple):
    """Upper limits of the sizes of a run's batches."""

    users: int
    distinct: int  # a multiple of 32
    rows: int
    inputs: int  # of a history


def batch_bounds(sequences: Sequences, batch_users: int) -> Bounds:
    """Return the sizes of a batch of the `batch_users` users with the longest training histories."""
    lengths = sequences.training_lengths[sequences.training_users]
    users = min(batch_users, len(lengths))
    slots = int(np.partition(lengths, len(lengths) - users)[len(lengths) - users :].sum()) if users else 0
    distinct = min(slots, len(sequences.item_ids))
    inputs = max(sequences.max_inputs, int(lengths.max(initial=2)) - 1)
    return Bounds(users, -(-distinct // 32) * 32, slots - users, inputs)


def steps_per_epoch(sequences: Sequences, batch_users: int) -> int:
    """Return the number of batches in an epoch."""
    return -(-len(sequences.training_users) // batch_users)


def epoch_windows(
    sequences: Sequences,
    batch_users: int,
    seed: int,
    epoch: int,
    batches: int,
    first_batches: int | None = None,
    taken: int = 0,
) -> Iterator[Window]:
    """Yield all training users once, shuffled by (seed, epoch), in windows of at most `batches` batches.

    first_batches: a smaller limit for the first window, so that the first step starts soon; None: `batches`. taken: the
    number of batches at the epoch's start that are left out, because their steps are done.
    """
    order = np.random.default_rng((seed, epoch)).permutation(sequences.training_users)
    step = epoch * steps_per_epoch(sequences, batch_users) + taken
    size = min(batches, first_batches or batches)
    start = taken * batch_users
    while start < len(order):
        users = order[start : start + size * batch_users]
        yield Window(users, step)
        step += size
        start += len(users)
        size = batches


@dataclass(frozen=True)
class Layout:
    """Training histories of N users in B batches with R rows, S slots and V distinct items in all.

    A slot is a place in a history. A row is a slot with a next slot in the same history. An item that occurs in two
    batches counts twice in V. Bounds are the start of each batch, then the end of the last.
    """

    users: np.ndarray  # int64 [N]
    user_bounds: np.ndarray  # [B + 1]
    slot_bounds: np.ndarray  # [B + 1]
    row_bounds: np.ndarray  # [B + 1]
    distinct_bounds: np.ndarray  # [B + 1]
    user_slots: np.ndarray  # [N]: where the slots of each user start
    user_rows: np.ndarray  # [N + 1]: where the rows of each user start, then R
    row_user: np.ndarray  # [R]: 0 .. N - 1
    row_slot: np.ndarray  # [R]: 0 .. S - 1
    slot_user: np.ndarray  # [S]
    slot_distinct: np.ndarray  # [S]: the item of each slot, an index into its batch's distinct items
    sorted_slots: np.ndarray  # [S]: by batch, by item, then in order
    distinct: np.ndarray  # [V]: item numbers, ascending in each batch
    occurrences: np.ndarray  # [V + 1]: where the sorted slots of each distinct item start, then S

    @property
    def batches(self) -> int:
        """Return the number of batches."""
        return len(self.user_bounds) - 1

    def by_batch(self, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Repeat each batch's value (`values`: [B]) for every element between its `bounds` ([B + 1])."""
        return np.repeat(values, np.diff(bounds))


def lay_out(sequences: Sequences, users: np.ndarray, batch_users: int) -> Layout:
    """Lay out users (int64 [N], at least one) in batches of `batch_users`; the last batch may be smaller."""
    starts = sequences.offsets[users]
    lengths = sequences.training_ends[users] - starts
    user_bounds = np.minimum(np.arange(0, len(users) + batch_users, batch_users), len(users))
    user_slots = _starts(lengths)
    user_rows = _starts(np.maximum(lengths - 1, 0))
    slot_user = np.repeat(np.arange(len(users)), lengths)
    row_user = np.repeat(np.arange(len(users)), np.diff(user_rows))
    slots = (starts - user_slots[:-1])[slot_user] + np.arange(user_slots[-1])
    slot_items = sequences.items[slots].astype(np.int64, copy=False)
    slot_bounds = user_slots[user_bounds]
    sorted_slots, distinct, occurrences, distinct_bounds = _sort(slot_items, slot_bounds, len(sequences.item_ids))
    index = np.arange(len(distinct)) - np.repeat(distinct_bounds[:-1], np.diff(distinct_bounds))
    slot_distinct = np.empty_like(slot_items)
    slot_distinct[sorted_slots] = np.repeat(index, np.diff(occurrences))
    return Layout(
        users=users,
        user_bounds=user_bounds,
        slot_bounds=slot_bounds,
        row_bounds=user_rows[user_bounds],
        distinct_bounds=distinct_bounds,
        user_slots=user_slots[:-1],
        user_rows=user_rows,
        row_user=row_user,
        row_slot=(user_slots - user_rows)[row_user] + np.arange(user_rows[-1]),
        slot_user=slot_user,
        slot_distinct=slot_distinct,
        sorted_slots=sorted_slots,
        distinct=distinct,
        occurrences=occurrences,
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return the start of each run of `counts` elements, then the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)])


def _sort(
    slot_items: np.ndarray, slot_bounds: np.ndarray, items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the slots sorted by batch and item, the distinct items, where the slots of each start, and their bounds.

    Item and slot are packed into one integer, so that values are sorted, not indices; each batch is a line of a table.
    Raises ValueError for a batch too large to be sorted.
    """
    counts = np.diff(slot_bounds)
    width = int(counts.max())
    bits = width.bit_length()
    if bits + items.bit_length() > 63:
        raise ValueError(f"a batch of {width} slots of {items} items is too large to be sorted")
    in_batch = np.arange(width) < counts[:, None]
    keys = np.full(in_batch.shape, np.iinfo(np.int64).max)
    first_slots = np.repeat(slot_bounds[:-1], counts)
    keys[in_batch] = (slot_items << bits) | (np.arange(len(slot_items)) - first_slots)
    keys.sort(axis=1)
    sorted_keys = keys[in_batch]
    sorted_items = sorted_keys >> bits
    is_first = np.empty(len(slot_items), dtype=bool)
    np.not_equal(sorted_items[1:], sorted_items[:-1], out=is_first[1:])
    is_first[slot_bounds[:-1]] = True
    occurrences = np.flatnonzero(is_first)
    bounds = np.searchsorted(occurrences, slot_bounds)
    sorted_slots = (sorted_keys & ((1 << bits) - 1)) + first_slots
    return sorted_slots, sorted_items[occurrences], np.append(occurrences, len(slot_items)), bounds
