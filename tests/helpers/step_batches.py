"""Packed batches of the GPU's step, written slot by slot in plain loops; the fast epoch plan must give the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from iisan_fast.kernels.types import HEADER, StepBatch, StepShape

INPUT, TARGET = 1, 2  # flags of an occurrence

Histories = Sequence[Sequence[int]]  # item numbers, the oldest first; a history of n items gives n - 1 rows


def step_shape(
    histories: Histories, positions: int = 0, tile_rows: int = 16, spare: tuple[int, int, int] = (0, 0, 0)
) -> StepShape:
    """Return the smallest shape that these histories fit, with spare users, words of distinct items, and tiles.

    Args: positions: number of the model's positions; 0 for as many as the longest history needs.
    """
    users, words, tiles = spare
    items = {item for history in histories for item in history}
    longest = max((len(history) - 1 for history in histories), default=1)
    _, used = _first_rows(histories, tile_rows)
    distinct = 32 * (-(-len(items) // 32) + words)
    return StepShape(len(histories) + users, distinct, used + tiles, tile_rows, positions or longest)


def pack_batch(
    histories: Histories,
    shape: StepShape,
    users: Sequence[int] = (),
    step: int = 0,
    prefix: int = 0,
    whole: Histories | None = None,
    rank: int = 0,
) -> Tensor:
    """Return a batch packed as `StepBatch` reads it.

    Args: users: the users' numbers; 0, 1 … if empty; prefix: the dropout's hash of seed and step; whole: the histories
    of all ranks, if the others are those of this rank.
    """
    whole = histories if whole is None else whole
    buffer = torch.zeros(shape.starts()[-1], dtype=torch.int32)
    batch = StepBatch.of(buffer, shape)
    batch.users.fill_(-1)
    batch.inputs.fill_(-1)
    batch.row_users.fill_(shape.users)
    items = sorted({item for history in whole for item in history})
    index = {item: i for i, item in enumerate(items)}
    first_rows, tiles = _first_rows(histories, shape.tile_rows)
    occurrences: dict[int, list[int]] = defaultdict(list)
    words = [[0] * (shape.users + 1) for _ in range(shape.words)]
    for user, history in enumerate(histories):
        batch.users[user] = users[user] if users else user
        for i, item in enumerate(history):
            row = first_rows[user] + i
            is_input = i + 1 < len(history)
            occurrences[index[item]].append(4 * row + INPUT * is_input + TARGET * (i > 0))
            words[index[item] // 32][user] |= 1 << index[item] % 32
            if is_input:
                batch.inputs[row] = index[item]
                batch.targets[row] = index[history[i + 1]]
                batch.row_users[row] = user
                batch.positions[row] = shape.positions + 1 - len(history) + i
    listed = [code for i in range(len(items)) for code in occurrences[i]]
    batch.distinct[: len(items)] = torch.tensor(items, dtype=torch.int32)
    batch.occurrences[: len(listed)] = torch.tensor(listed, dtype=torch.int32)
    batch.offsets.copy_(_offsets([len(occurrences[i]) for i in range(len(items))], shape))
    if shape.ranks > 1:
        everywhere = [item for history in whole for item in history]
        batch.whole_offsets.copy_(_offsets([everywhere.count(item) for item in items], shape))
        encoded = [item for i, item in enumerate(items) if i % shape.ranks == rank]
        batch.encoded_count.fill_(len(encoded))
        batch.encoded[: len(encoded)] = torch.tensor(encoded, dtype=torch.int32)
    batch.history_bits.copy_(torch.tensor([[_signed(word) for word in line] for line in words], dtype=torch.int32))
    rows = sum(len(history) - 1 for history in whole)
    counts = {"distinct": len(items), "rows": rows, "tiles": tiles, "users": len(histories)}
    counts |= {"step": step, "prefix": _signed(prefix), "occurrences": len(listed)}
    batch.header[: len(HEADER)] = torch.tensor([counts[name] for name in HEADER], dtype=torch.int32)
    return buffer


def make_batch(histories: Histories, positions: int = 0, tile_rows: int = 16) -> tuple[StepShape, StepBatch]:
    """Return the smallest shape of these histories, and their batch."""
    shape = step_shape(histories, positions, tile_rows)
    return shape, StepBatch.of(pack_batch(histories, shape), shape)


def _first_rows(histories: Histories, tile_rows: int) -> tuple[list[int], int]:
    """Return each user's first row and the number of tiles; users stand in one tile each, and tiles fill in order."""
    first_rows = []
    row = 0
    for history in histories:
        if row % tile_rows + len(history) - 1 > tile_rows:
            row = -(-row // tile_rows) * tile_rows
        first_rows.append(row)
        row += len(history) - 1
    return first_rows, -(-row // tile_rows)


def _offsets(counts: Sequence[int], shape: StepShape) -> Tensor:
    """Return where each item's occurrences start, and their number from the last item on: int32 [V + 1]."""
    starts = [sum(counts[:i]) for i in range(shape.distinct + 1)]
    return torch.tensor(starts, dtype=torch.int32)


def _signed(word: int) -> int:
    """Return the int32 of a uint32's bits."""
    return word - (word >> 31 << 32)
