"""Training batches: each distinct item once, histories as indices into them, everything made of small integers.

The order of an epoch depends on the seed and the epoch alone, so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .sequences import Sequences


@dataclass(frozen=True)
class Batch:
    """B users' training sequences with V distinct items and R rows (positions that have a next item)."""

    step: int  # the run's step number, which the stateless dropout hashes
    length: int  # positions of the grid that the rows stand on: of the longest history, or more
    users: Tensor  # int64 [B]: user numbers, likewise hashed
    distinct: Tensor  # int64 [V]: ascending item numbers
    multiplicity: Tensor  # int64 [V]: slots of the batch that hold each distinct item
    inputs: Tensor  # int64 [R]: each row's own item, an index into distinct
    targets: Tensor  # int64 [R]: its next item, likewise
    row_users: Tensor  # int64 [R]: 0..B-1
    row_slots: Tensor  # int64 [R]: where the row stands on the grid, user * length + position, right-aligned, ascending
    weights: Tensor  # float64 [R]: each row's part in the mean loss
    history_bits: Tensor  # int32 [B, ceil(V / 32)]: bit v % 32 of word v // 32: distinct item v is the user's own

    def checked(self, table_rows: int) -> Batch:
        """The batch, unless an index leaves its range (ValueError): a GPU's kernels look at none of them."""
        users, distinct = len(self.users), len(self.distinct)
        for name, limit, lowest in (
            ("distinct", table_rows, 1),
            ("inputs", distinct, 0),
            ("targets", distinct, 0),
            ("row_users", users, 0),
            ("row_slots", users * self.length, 0),
        ):
            indices = getattr(self, name)
            kernels.check_indices(f"batch.{name}", indices, None, limit, indices.device, lowest)
        return self

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def epoch_batches(sequences: Sequences, batch_users: int, seed: int, epoch: int) -> Iterator[Batch]:
    """All users once, shuffled by (seed, epoch), `batch_users` at a time; the last batch may be smaller."""
    count = len(sequences.user_ids)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    first_step = epoch * steps_per_epoch(sequences, batch_users)
    for index, start in enumerate(range(0, count, batch_users)):
        yield make_batch(sequences, order[start : start + batch_users], first_step + index)


def steps_per_epoch(sequences: Sequences, batch_users: int) -> int:
    """Batches in an epoch."""
    return -(-len(sequences.user_ids) // batch_users)


def make_batch(sequences: Sequences, users: np.ndarray, step: int) -> Batch:
    """The batch of the given users (int64 [B]); each has at least two training interactions or gives no row."""
    offsets, items = sequences.training
    starts, lengths = offsets[users], offsets[users + 1] - offsets[users]
    slot_user = np.repeat(np.arange(len(users)), lengths)
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    distinct, slots, multiplicity = np.unique(
        items[np.repeat(starts, lengths) + position], return_inverse=True, return_counts=True
    )
    length = int(lengths.max()) - 1
    is_input = position < np.repeat(lengths, lengths) - 1
    row_users, rows = slot_user[is_input], int(is_input.sum())
    column = position[is_input] + length - (lengths[row_users] - 1)
    return Batch(
        step=step,
        length=length,
        users=_tensor(users),
        distinct=_tensor(distinct),
        multiplicity=_tensor(multiplicity),
        inputs=_tensor(slots[is_input]),
        targets=_tensor(slots[position > 0]),
        row_users=_tensor(row_users),
        row_slots=_tensor(row_users * length + column),
        weights=torch.full((rows,), 1 / rows, dtype=torch.float64),
        history_bits=torch.from_numpy(_history_bits(slot_user, slots, len(users), len(distinct))),
    )


def _history_bits(slot_user: np.ndarray, slots: np.ndarray, users: int, distinct: int) -> np.ndarray:
    own = np.zeros((users, -(-distinct // 32) * 32), dtype=bool)
    own[slot_user, slots] = True
    return np.packbits(own, axis=1, bitorder="little").view("<i4")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False))
