"""Training batches: each distinct item once, histories as indices into them, everything made of small integers.

The order of an epoch depends on the seed and the epoch alone, so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .sequences import Sequences


class Shape(NamedTuple):
    """The sizes of a batch."""

    users: int
    distinct: int
    rows: int
    length: int

    @property
    def words(self) -> int:
        """Words of 32 history bits a user."""
        return -(-self.distinct // 32)

    def padded(self, users: int, length: int) -> Shape:
        """The bucket that takes this batch: few enough buckets that each can be captured, little enough padding.

        users, length: the most that any batch has; one user is added, whom the padding rows belong to.
        """
        return Shape(users + 1, _bucket(self.distinct), _bucket(self.rows), length)


@dataclass(frozen=True)
class Batch:
    """B users' training sequences with V distinct items and R rows (positions that have a next item).

    A padded batch holds more of each: user -1, item 0 with multiplicity 0, rows of weight 0. They change no loss.
    """

    step: int | Tensor  # the run's step number, which the stateless dropout hashes; int64 scalar on a device
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
    buffer: Tensor | None = None  # what all of it lies in, if it was unpacked

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return Shape(len(self.users), len(self.distinct), len(self.targets), self.length)

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

    def padded(self, shape: Shape) -> Batch:
        """The batch padded to a shape with more users, so that padding rows have one of their own."""
        if shape.users <= len(self.users) or any(room < size for room, size in zip(shape, self.shape)):
            raise ValueError(f"batch: {self.shape} does not fit into {shape}")
        rows, distinct = shape.rows - len(self.targets), shape.distinct - len(self.distinct)
        users = shape.users - len(self.users)
        position = self.row_slots % self.length + shape.length - self.length
        return Batch(
            step=self.step,
            length=shape.length,
            users=F.pad(self.users, (0, users), value=-1),
            distinct=F.pad(self.distinct, (0, distinct)),
            multiplicity=F.pad(self.multiplicity, (0, distinct)),
            inputs=F.pad(self.inputs, (0, rows)),
            targets=F.pad(self.targets, (0, rows)),
            row_users=F.pad(self.row_users, (0, rows), value=shape.users - 1),
            row_slots=F.pad(self.row_users * shape.length + position, (0, rows), value=shape.users * shape.length - 1),
            weights=F.pad(self.weights, (0, rows)),
            history_bits=F.pad(self.history_bits, (0, shape.words - self.history_bits.shape[1], 0, users)),
        )

    def packed(self, pin: bool = False) -> Tensor:
        """Pack the batch into one int64 [count] tensor on the host, pinned if asked: one copy takes it to a device."""
        bits = self.history_bits.flatten()
        whole = [
            torch.tensor([self.step]),
            *(getattr(self, name) for name in PACKED_COLUMNS),
            self.weights.view(torch.int64),
            F.pad(bits, (0, len(bits) % 2)).view(torch.int64),
        ]
        out = torch.empty(sum(map(len, whole)), dtype=torch.int64, pin_memory=pin)
        return torch.cat(whole, out=out)

    @staticmethod
    def unpacked(buffer: Tensor, shape: Shape) -> Batch:
        """The batch that lies in a packed buffer, on the buffer's device; nothing is copied."""
        users, distinct, rows, length = shape
        bits = users * shape.words
        counts = [1, users, distinct, distinct, rows, rows, rows, rows, rows, (bits + 1) // 2]
        step, *columns, weights, words = buffer.split(counts)
        return Batch(
            step=step[0],
            length=length,
            **dict(zip(PACKED_COLUMNS, columns)),
            weights=weights.view(torch.float64),
            history_bits=words.view(torch.int32)[:bits].view(users, shape.words),
            buffer=buffer,
        )

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device, in one copy."""
        if device.type == "cpu":
            return self
        return Batch.unpacked(self.packed(pin=True).to(device, non_blocking=True), self.shape)


PACKED_COLUMNS = ("users", "distinct", "multiplicity", "inputs", "targets", "row_users", "row_slots")


def epoch_batches(sequences: Sequences, batch_users: int, seed: int, epoch: int) -> Iterator[Batch]:
    """All training users once, shuffled by (seed, epoch), `batch_users` at a time; the last batch may be smaller."""
    order = np.random.default_rng((seed, epoch)).permutation(sequences.training_users)
    first_step = epoch * steps_per_epoch(sequences, batch_users)
    for index, start in enumerate(range(0, len(order), batch_users)):
        yield make_batch(sequences, order[start : start + batch_users], first_step + index)


def steps_per_epoch(sequences: Sequences, batch_users: int) -> int:
    """Batches in an epoch."""
    return -(-len(sequences.training_users) // batch_users)


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


def _bucket(size: int) -> int:
    """The next size on a ladder of eight steps to each doubling, from 64 on."""
    step = max(8, 1 << max(0, (size - 1).bit_length() - 4))
    return max(64, -(-size // step) * step)


def _history_bits(slot_user: np.ndarray, slots: np.ndarray, users: int, distinct: int) -> np.ndarray:
    in_history = np.zeros((users, -(-distinct // 32) * 32), dtype=bool)
    in_history[slot_user, slots] = True
    return np.packbits(in_history, axis=1, bitorder="little").view("<i4")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False))
