"""Training batches: the distinct items of some users, and the users' histories as indices into them.

The order of an epoch depends on the seed and the epoch alone, so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..ranks import ALONE, Ranks
from .epoch_plan import Layout, batch_bounds, epoch_windows, lay_out, steps_per_epoch
from .loss_columns import IN_BATCH, Columns, Negatives, loss_columns, possible_negatives, widened
from .sequences import Sequences

WINDOW_SLOTS = 1 << 18  # of the batches laid out at a time, each of some 250 bytes
WINDOW_BYTES = 64 << 20  # of their columns and history bits, if the columns are more than the batches' items


class Shape(NamedTuple):
    """The sizes of a batch."""

    users: int
    distinct: int
    rows: int
    length: int

    @property
    def words(self) -> int:
        """Return the number of 32-bit words that hold a user's history bits."""
        return -(-self.distinct // 32)


@dataclass(frozen=True)
class Batch:
    """Training sequences of B users with V distinct items and R rows (positions that have a next item).

    The items are the columns of the loss: those of the sequences, and negatives that it takes beside them.

    A padded batch has more of each: user -1, item 0 with multiplicity 0, rows of weight 0. Padding changes no loss.
    """

    step: int | Tensor  # the run's step number, which the stateless dropout hashes; int64 scalar on a device
    length: int  # positions of a user in the grid of rows, at least those of the longest history
    users: Tensor  # int64 [B]: user numbers, likewise hashed
    distinct: Tensor  # int64 [V]: ascending item numbers
    multiplicity: Tensor  # int64 [V]: slots of the batch that hold each distinct item; 1 unless the loss is in-batch
    inputs: Tensor  # int64 [R]: the item of each row, an index into distinct
    targets: Tensor  # int64 [R]: its next item, likewise
    row_users: Tensor  # int64 [R]: 0..B-1
    row_slots: Tensor  # int64 [R]: place in the grid, user * length + position, right-aligned, ascending
    weights: Tensor  # float64 [R]: each row's part in the mean loss
    history_bits: Tensor  # int32 [B, ceil(V / 32)]: bit v % 32 of word v // 32: item v is no negative of the user
    buffer: Tensor | None = None  # the memory that all tensors share, if the batch was unpacked
    block: slice | None = None  # of a rank's share: the columns whose items this rank encodes; None for all

    @property
    def shape(self) -> Shape:
        """Return the batch's sizes."""
        return Shape(len(self.users), len(self.distinct), len(self.targets), self.length)

    @property
    def slots(self) -> int:
        """Return the number of places in the users' histories. The batch must not be padded."""
        return len(self.targets) + len(self.users)

    @property
    def encoded(self) -> Tensor:
        """Return the numbers of the items to encode: the whole of `distinct`, or this rank's block of it."""
        return self.distinct if self.block is None else self.distinct[self.block]

    def share(self, ranks: Ranks) -> Batch:
        """Return this rank's share of the batch: the rows of some of its users, with all columns.

        The shares of all ranks have each row once, with its weight in the whole batch. A rank without users takes the
        rows of the first one with weight 0; a rank without items encodes the first one, which no rank reads.
        """
        if not ranks.several:
            return self
        count = len(self.users)
        first, end = count * ranks.rank // ranks.count, count * (ranks.rank + 1) // ranks.count
        stands_in = first == end
        if stands_in:
            first, end = 0, 1
        bounds = torch.searchsorted(self.row_users, torch.tensor([first, end])).tolist()
        rows = slice(*bounds)
        return replace(
            self,
            users=self.users[first:end],
            inputs=self.inputs[rows],
            targets=self.targets[rows],
            row_users=self.row_users[rows] - first,
            row_slots=self.row_slots[rows] - first * self.length,
            weights=torch.zeros_like(self.weights[rows]) if stands_in else self.weights[rows],
            history_bits=self.history_bits[first:end],
            buffer=None,
            block=_encoded_block(len(self.distinct), ranks),
        )

    def checked(self, table_rows: int) -> Batch:
        """Return the batch after a check of its indices, which kernels on a GPU do not check.

        table_rows: rows of the item table. Raises ValueError for an index out of range.
        """
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

    def padded(self, shape: Shape, ranks: Ranks = ALONE) -> Batch:
        """Return the batch padded to a shape with more users; the last user has the padding rows.

        ranks: whose share the batch is; each rank then encodes a block of the padded items, which is the same for all
        batches. Raises ValueError if the batch does not fit into the shape.
        """
        if shape.users <= len(self.users) or any(room < size for room, size in zip(shape, self.shape)):
            raise ValueError(f"batch: {self.shape} does not fit into {shape}")
        rows = shape.rows - len(self.targets)
        distinct = shape.distinct - len(self.distinct)
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
            block=_encoded_block(shape.distinct, ranks) if ranks.several else None,
        )

    def packed(self, pin: bool = False) -> Tensor:
        """Return the batch as one int64 tensor on the host, which one copy takes to a device. pin: in pinned memory."""
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
    def unpacked(buffer: Tensor, shape: Shape, block: slice | None = None) -> Batch:
        """Return the batch of a packed buffer, as views of it, on its device. block: of the packed batch."""
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
            block=block,
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, after one copy; the batch itself if the device is a CPU."""
        if device.type == "cpu":
            return self
        return Batch.unpacked(self.packed(pin=True).to(device, non_blocking=True), self.shape, self.block)


PACKED_COLUMNS = ("users", "distinct", "multiplicity", "inputs", "targets", "row_users", "row_slots")


def padded_shape(
    sequences: Sequences, batch_users: int, negatives: Negatives = IN_BATCH, ranks: Ranks = ALONE
) -> Shape:
    """Return the shape that all batches of a run, or a rank's shares of them, are padded to.

    It has one more user, for the padding rows.
    """
    bounds = widened(batch_bounds(sequences, batch_users), negatives, sequences)
    of_share = batch_bounds(sequences, ranks.block_size(batch_users))
    return Shape(of_share.users + 1, bounds.distinct, of_share.rows, bounds.inputs)


def epoch_batches(
    sequences: Sequences,
    batch_users: int,
    seed: int,
    epoch: int,
    window_batches: int | None = None,
    taken: int = 0,
    negatives: Negatives = IN_BATCH,
) -> Iterator[Batch]:
    """Yield all training users once, shuffled by (seed, epoch), `batch_users` at a time; the last batch may be smaller.

    window_batches: how many batches are laid out at a time; None: as many as take 64 MB. taken: how many batches at the
    epoch's start are left out. negatives: the items that the loss compares targets with.
    """
    if window_batches is None:
        window_batches = _window_batches(sequences, batch_users, negatives)
    possible = possible_negatives(sequences)
    for window in epoch_windows(sequences, batch_users, seed, epoch, window_batches, taken=taken):
        yield from _batches(lay_out(sequences, window.users, batch_users), window.first_step, negatives, possible)


def make_batch(sequences: Sequences, users: np.ndarray, step: int, negatives: Negatives = IN_BATCH) -> Batch:
    """Return the batch of some users (int64 [B]). A user with fewer than two training interactions has no row.

    step: number of the training step, which the dropout hashes and the draws of negatives.
    """
    possible = np.zeros(0, dtype=np.int64) if negatives.in_batch else possible_negatives(sequences)
    (batch,) = _batches(lay_out(sequences, users, len(users)), step, negatives, possible)
    return batch


def _encoded_block(items: int, ranks: Ranks) -> slice:
    """Return the items that a rank encodes: its block, or the first one if that is empty."""
    block = ranks.block(items)
    return block if block.stop > block.start else slice(0, 1)


def _window_batches(sequences: Sequences, batch_users: int, negatives: Negatives) -> int:
    """Return how many batches are laid out at a time, at least one."""
    steps = steps_per_epoch(sequences, batch_users)
    batches = WINDOW_SLOTS * steps // max(1, sequences.epoch_interactions)
    if not negatives.in_batch:
        users, columns, *_ = padded_shape(sequences, batch_users, negatives)
        batches = min(batches, WINDOW_BYTES // (16 * columns + users * columns // 8))
    return max(1, batches)


def _batches(layout: Layout, first_step: int, negatives: Negatives, possible: np.ndarray) -> Iterator[Batch]:
    """Yield the batches of a layout, as views of arrays that hold all batches.

    first_step: step number of the first. possible: from `possible_negatives`.
    """
    columns = loss_columns(layout, first_step, negatives, possible)
    rows = np.diff(layout.row_bounds)
    lengths = np.maximum.reduceat(np.diff(layout.user_rows), layout.user_bounds[:-1])
    row_users = layout.row_user - layout.by_batch(layout.user_bounds[:-1], layout.row_bounds)
    row_lengths = layout.by_batch(lengths, layout.row_bounds)
    positions = np.arange(len(row_users)) + row_lengths - layout.user_rows[1:][layout.row_user]
    whole = {
        "users": (layout.users, layout.user_bounds),
        "distinct": (columns.items, columns.bounds),
        "multiplicity": (columns.multiplicity, columns.bounds),
        "inputs": (columns.slots[layout.row_slot], layout.row_bounds),
        "targets": (columns.slots[layout.row_slot + 1], layout.row_bounds),
        "row_users": (row_users, layout.row_bounds),
        "row_slots": (row_users * row_lengths + positions, layout.row_bounds),
        "weights": (layout.by_batch(1 / rows, layout.row_bounds), layout.row_bounds),
    }
    parts = [torch.from_numpy(array).split(np.diff(bounds).tolist()) for array, bounds in whole.values()]
    bits_of = _history_bits(layout, columns, negatives.own_mask)
    for index, (length, bits, *fields) in enumerate(zip(lengths.tolist(), bits_of, *parts, strict=True)):
        yield Batch(step=first_step + index, length=length, history_bits=bits, **dict(zip(whole, fields)))


def _history_bits(layout: Layout, columns: Columns, own_mask: bool) -> list[Tensor]:
    """Return the history bits of each batch: int32 [users, words], one bit for each column.

    own_mask: whether the bits of the user's items are set, beside those of columns that are negatives of no row.
    """
    users = np.diff(layout.user_bounds)
    words = -(-np.diff(columns.bounds) // 32)
    bounds = np.concatenate([[0], np.cumsum(users * words)])
    first_words = layout.by_batch(bounds[:-1] - layout.user_bounds[:-1] * words, layout.user_bounds)
    user_words = first_words + np.arange(len(layout.users)) * layout.by_batch(words, layout.user_bounds)
    bits = np.zeros(bounds[-1], dtype=np.uint32)
    if own_mask:
        index = columns.slots
        np.bitwise_or.at(
            bits, user_words[layout.slot_user] + (index >> 5), np.uint32(1) << (index & 31).astype(np.uint32)
        )
    parts = np.split(bits, bounds[1:-1])
    sizes = zip(users.tolist(), words.tolist())
    return [
        _with_bits_set(part.reshape(size), barred)
        for part, size, barred in zip(parts, sizes, columns.barred, strict=True)
    ]


def _with_bits_set(bits: np.ndarray, columns: np.ndarray) -> Tensor:
    """Set the bits of some columns for all users, in place, and return the bits as int32.

    bits: uint32 [users, words]. columns: int64.
    """
    if len(columns):
        line = np.zeros(bits.shape[1], dtype=np.uint32)
        np.bitwise_or.at(line, columns >> 5, np.uint32(1) << (columns & 31).astype(np.uint32))
        bits |= line
    return torch.from_numpy(bits.view(np.int32))
