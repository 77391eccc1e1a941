"""Pack batches for a step on a GPU: windows of int32 words, all batches of a run in one shape.

`kernels.StepBatch` defines the layout. The rows of histories are packed into tiles in order: a user whose rows do not
fit into the current tile begins the next one. Where several ranks train together, each packs its share of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import HEADER, TILE_ROWS, StepShape, dropout_prefix
from ..ranks import ALONE, Ranks
from .epoch_plan import Layout, Window, batch_bounds, epoch_windows, lay_out, steps_per_epoch
from .layout_shares import layout_share
from .sequences import Sequences

WINDOW_BYTES = 64 << 20  # limit of a window with more than one batch
FIRST_BATCHES = 32  # limit of an epoch's first window, whose steps run while the next window is packed
MANY_USERS = 512  # a batch with more users has tiles of at least 32 rows


class BatchSize(NamedTuple):
    """The size of a batch, of all ranks together, without padding."""

    rows: int
    slots: int  # places in the users' histories


class PackedWindow(NamedTuple):
    """Packed batches that follow one another, on the host."""

    words: Tensor  # int32 [batches, words]
    sizes: list[BatchSize]  # of each batch
    items: tuple[Tensor, ...]  # int64: the items of each batch that this rank encodes, at least one


@dataclass(frozen=True)
class RunPlan:
    """A run's batches, packed in windows."""

    sequences: Sequences
    batch_users: int
    seed: int  # of the order and of the dropout
    shape: StepShape
    window_batches: int  # at most as many in a window
    first_batches: int = FIRST_BATCHES  # at most as many in an epoch's first window
    own_mask: bool = True  # leave the items of a row's user out of its negatives
    ranks: Ranks = ALONE

    @classmethod
    def of(
        cls, sequences: Sequences, batch_users: int, seed: int, own_mask: bool = True, ranks: Ranks = ALONE
    ) -> RunPlan | None:
        """Plan a run, or return None if a history is too long for a tile. The plans of all ranks have one shape."""
        shape = step_shape(sequences, batch_users, ranks=ranks)
        if shape is None:
            return None
        batches = min(window_batches(shape), steps_per_epoch(sequences, batch_users))
        return cls(sequences, batch_users, seed, shape, batches, own_mask=own_mask, ranks=ranks)

    def windows(self, epoch: int, taken: int = 0) -> Iterator[Window]:
        """Yield the windows of an epoch, which `pack` takes, without its first `taken` batches."""
        sizes = self.window_batches, min(self.first_batches, self.window_batches)
        return epoch_windows(self.sequences, self.batch_users, self.seed, epoch, *sizes, taken)

    def pack(self, window: Window, pin: bool = False) -> PackedWindow:
        """Pack this rank's share of a window into new memory of the host. pin: into pinned memory."""
        layout = lay_out(self.sequences, window.users, self.batch_users)
        size = (layout.batches, self.shape.starts()[-1])
        words = torch.empty(size, dtype=torch.int32, pin_memory=pin)
        pack_window(layout, self.shape, window.first_step, self.seed, words.numpy(), self.own_mask, self.ranks)
        counts = (np.diff(bounds).tolist() for bounds in (layout.row_bounds, layout.slot_bounds))
        distinct = torch.from_numpy(layout.distinct).split(np.diff(layout.distinct_bounds).tolist())
        items = tuple(self._encoded(items) for items in distinct) if self.ranks.several else distinct
        return PackedWindow(words, list(map(BatchSize, *counts)), items)

    def _encoded(self, distinct: Tensor) -> Tensor:
        """Return the items that this rank encodes; the first of all if there is none, so that a source can read it."""
        encoded = distinct[self.ranks.rank :: self.ranks.count]
        return encoded.contiguous() if len(encoded) else distinct[:1]


def step_shape(
    sequences: Sequences, batch_users: int, tile_rows: int | None = None, ranks: Ranks = ALONE
) -> StepShape | None:
    """Return the shape that every batch of a run fits into, or None if a history is too long for a tile.

    tile_rows: one of TILE_ROWS; None: the smallest one that suits the run.
    """
    bounds = batch_bounds(sequences, batch_users)
    share_users = -(-batch_users // ranks.count)
    share = batch_bounds(sequences, min(share_users, ranks.block_size(bounds.users)))
    if tile_rows is None:
        least = max(bounds.inputs, 32 if share_users > MANY_USERS else 16)
        tile_rows = next((rows for rows in TILE_ROWS if rows >= least), 0)
    if bounds.inputs > tile_rows:
        return None
    # Two neighbouring tiles hold more rows than one has: the second one's first user did not fit into the first.
    tiles = min(share.users, 2 * share.rows // tile_rows + 1)
    return StepShape(share.users, bounds.distinct, tiles, tile_rows, bounds.inputs, ranks.count)


def window_batches(shape: StepShape) -> int:
    """Return how many batches of a shape a window of WINDOW_BYTES has, at least one."""
    return max(1, WINDOW_BYTES // (4 * shape.starts()[-1]))


def pack_window(
    whole: Layout,
    shape: StepShape,
    first_step: int,
    seed: int,
    out: np.ndarray,
    own_mask: bool = True,
    ranks: Ranks = ALONE,
) -> None:
    """Pack batches into `out`, int32 [batches, words], as `StepBatch`es of the shape. Every word of it is written.

    whole: the batches of all ranks. first_step: the run's step number of the first batch. seed: seed of the dropout.
    own_mask: whether the history bits are set. ranks: whose share is packed. Raises ValueError for a batch that does
    not fit into the shape.
    """
    layout = layout_share(whole, ranks)
    first_rows, tiles = _tiles(layout, shape.tile_rows)
    counts = _headers(layout, tiles, first_step, seed)
    _check(layout, shape, counts)
    counts["rows"] = np.diff(whole.row_bounds)
    places = dict(zip(shape.fields(), shape.starts()))
    words = out.shape[1]
    flat = out.reshape(-1)
    out.fill(0)
    fillers = {"users": -1, "inputs": -1, "row_users": shape.users, "offsets": counts["occurrences"][:, None]}
    if ranks.several:
        fillers["whole_offsets"] = np.diff(whole.slot_bounds)[:, None]
    for name, filler in fillers.items():
        (size,) = shape.fields()[name]
        out[:, places[name] : places[name] + size] = filler
    out[:, : len(HEADER)] = np.stack([counts[name] for name in HEADER], axis=1)
    starts = np.arange(layout.batches) * words  # where each batch starts in `flat`
    user_places = np.arange(len(layout.users)) + layout.by_batch(starts - layout.user_bounds[:-1], layout.user_bounds)
    flat[places["users"] :][user_places] = layout.users
    _pack_items(layout, places, flat, starts)
    _pack_rows(layout, shape, places, flat, starts, first_rows)
    _pack_occurrences(layout, places, flat, starts, first_rows)
    if own_mask:
        _pack_history_bits(layout, shape, places, flat, starts)
    if ranks.several:
        _pack_whole(whole, ranks, places, flat, starts)


def _tiles(layout: Layout, tile_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each user's first row among the tiles of the batch [N], and the number of tiles of each batch [B]."""
    rows = layout.user_rows
    users = len(layout.users)
    row_users = np.append(layout.row_user, users)
    following = row_users[
        np.minimum(rows[:-1] + tile_rows, rows[-1])
    ]  # the first user after a tile that this user begins
    following = np.minimum(following, layout.by_batch(layout.user_bounds[1:], layout.user_bounds)).tolist()
    first_users = []
    user = 0
    while user < users:
        first_users.append(user)
        user = following[user]
    first_users = np.array(first_users, dtype=np.int64)
    bounds = np.searchsorted(first_users, layout.user_bounds)
    in_batch = np.arange(len(first_users)) - np.repeat(bounds[:-1], np.diff(bounds))
    shifts = np.repeat(in_batch * tile_rows - rows[first_users], np.diff(first_users, append=users))
    return rows[:-1] + shifts, np.diff(bounds)


def _headers(layout: Layout, tiles: np.ndarray, first_step: int, seed: int) -> dict[str, np.ndarray]:
    """Return the fields of the batches' headers by their names in HEADER, each of them [B]."""
    steps = first_step + np.arange(layout.batches)
    return {
        "distinct": np.diff(layout.distinct_bounds),
        "rows": np.diff(layout.row_bounds),
        "tiles": tiles,
        "users": np.diff(layout.user_bounds),
        "step": steps,
        "prefix": dropout_prefix(seed, steps).astype(np.uint32).view(np.int32),
        "occurrences": np.diff(layout.slot_bounds),
    }


def _check(layout: Layout, shape: StepShape, counts: dict[str, np.ndarray]) -> None:
    """Raise ValueError if a batch does not fit into the shape. counts: the fields of `_headers`."""
    limits = {"distinct": shape.distinct, "tiles": shape.tiles, "users": shape.users, "step": (1 << 31) - 2}
    for name, limit in limits.items():
        if (most := int(counts[name].max())) > limit:
            raise ValueError(f"batch.{name}: expected at most {limit}, found {most}")
    if (most := int(np.diff(layout.user_rows).max(initial=0))) > shape.positions:
        raise ValueError(f"batch.positions: expected at most {shape.positions}, found {most}")


def _pack_items(layout: Layout, places: dict[str, int], flat: np.ndarray, starts: np.ndarray) -> None:
    """Write the distinct items, and where the occurrences of each start.

    In this function and those below: `flat` is all words, `starts` [B] where each batch starts in it, `places` where
    each field starts within a batch, and `first_rows` [N] is each user's first row among the tiles of its batch.
    """
    bounds = layout.distinct_bounds
    item_places = np.arange(len(layout.distinct)) + layout.by_batch(starts - bounds[:-1], bounds)
    flat[places["distinct"] :][item_places] = layout.distinct.astype(np.int32)
    first_slots = layout.by_batch(layout.slot_bounds[:-1], bounds)
    flat[places["offsets"] :][item_places] = (layout.occurrences[:-1] - first_slots).astype(np.int32)


def _pack_rows(
    layout: Layout,
    shape: StepShape,
    places: dict[str, int],
    flat: np.ndarray,
    starts: np.ndarray,
    first_rows: np.ndarray,
) -> None:
    """Write the rows: input, target, user and position of each."""
    user = layout.row_user
    slot = layout.row_slot
    rows = np.arange(len(user))
    users_starts = layout.by_batch(starts, layout.user_bounds)
    row_places = rows + (users_starts + first_rows - layout.user_rows[:-1])[user]
    values = {
        "inputs": layout.slot_distinct[slot],
        "targets": layout.slot_distinct[slot + 1],
        "row_users": user - layout.by_batch(layout.user_bounds[:-1], layout.row_bounds),
        "positions": rows + (shape.positions - layout.user_rows[1:])[user],
    }
    for name, field in values.items():
        flat[places[name] :][row_places] = field.astype(np.int32)


def _pack_occurrences(
    layout: Layout, places: dict[str, int], flat: np.ndarray, starts: np.ndarray, first_rows: np.ndarray
) -> None:
    """Write the slots of each item: 4 * row, plus 1 for an input of that row, plus 2 for a target of the row before."""
    codes = 4 * (np.arange(len(layout.slot_user)) + (first_rows - layout.user_slots)[layout.slot_user]) + 3
    codes[layout.user_slots] -= 2  # the first slot of a history is no target
    lengths = np.diff(layout.user_slots, append=len(codes))
    codes[layout.user_slots + lengths - 1] -= 1  # the last slot is no input
    bounds = layout.slot_bounds
    slot_places = np.arange(len(codes)) + layout.by_batch(starts - bounds[:-1], bounds)
    flat[places["occurrences"] :][slot_places] = codes.astype(np.int32)[layout.sorted_slots]


def _pack_history_bits(
    layout: Layout, shape: StepShape, places: dict[str, int], flat: np.ndarray, starts: np.ndarray
) -> None:
    """Write the history bits: bit v % 32 of word (v // 32, user) says that the user has distinct item v."""
    index = layout.slot_distinct
    width = shape.users + 1
    first_words = layout.by_batch(starts - layout.user_bounds[:-1] + places["history_bits"], layout.slot_bounds)
    words = (index >> 5) * width + (layout.slot_user + first_words)
    bits = np.left_shift(np.uint32(1), (index & 31).astype(np.uint32))
    np.bitwise_or.at(flat.view(np.uint32), words, bits)


def _pack_whole(whole: Layout, ranks: Ranks, places: dict[str, int], flat: np.ndarray, starts: np.ndarray) -> None:
    """Write the fields that a batch of several ranks has beside the others, from the batches of all ranks."""
    bounds = whole.distinct_bounds
    index = np.arange(len(whole.distinct)) - whole.by_batch(bounds[:-1], bounds)
    items_starts = whole.by_batch(starts, bounds)
    offsets = whole.occurrences[:-1] - whole.by_batch(whole.slot_bounds[:-1], bounds)
    flat[places["whole_offsets"] :][items_starts + index] = offsets.astype(np.int32)
    taken = index % ranks.count == ranks.rank
    flat[places["encoded"] :][items_starts[taken] + index[taken] // ranks.count] = whole.distinct[taken]
    flat[places["encoded_count"] :][starts] = -((ranks.rank - np.diff(bounds)) // ranks.count)
