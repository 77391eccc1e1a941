"""Bring interactions into the order of histories, in parts of whole users and with little memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..polars_module import pl

ROWS_AT_ONCE = 500_000  # of a part, about; users are not cut
RADIX = 2**16  # numpy sorts integers below it in linear time


@dataclass(frozen=True)
class OrderedHistories:
    """Histories in parts of whole users, in order of their codes; each id's code is its place in the ids."""

    parts: list[pl.DataFrame]  # user and item, UInt32; timestamp, Int64, and part, UInt8, if they are known
    user_ids: pl.Series
    item_ids: pl.Series

    def __len__(self) -> int:
        """Return the number of interactions."""
        return sum(map(len, self.parts))

    def with_parts(self, parts: list[pl.DataFrame]) -> OrderedHistories:
        """Return histories with the same ids and other interactions."""
        return replace(self, parts=parts)

    def used_items(self) -> np.ndarray:
        """Return the codes of the items with interactions, in order."""
        used = np.zeros(len(self.item_ids), bool)
        for part in self.parts:
            used[part["item"].to_numpy()] = True
        return np.flatnonzero(used)


def ordered_histories(interactions: pl.DataFrame) -> OrderedHistories:
    """Return the interactions, as `read_interactions` returns them, in the order of histories.

    A user's interactions are in order of their part of a split, if there are parts, then of time, if there are times,
    then of the source. Beside the interactions, as much memory as they take is needed, and none if they are in order
    of users.
    """
    codes = pl.DataFrame(
        [column.to_physical() if column.name in ("user", "item") else column for column in interactions]
    )
    counts = np.zeros(0, np.int64)
    in_order = True
    last = 0
    for users in _blocks(codes["user"]):
        in_order &= last <= users[0] and bool((users[1:] >= users[:-1]).all())
        last = users[-1]
        counted = np.bincount(users, minlength=len(counts))
        counted[: len(counts)] += counts
        counts = counted
    ends = np.cumsum(counts)
    bounds = _bounds(ends)
    if in_order:
        arrays = [{name: part[name].to_numpy() for name in part.columns} for part in _slices(codes, bounds)]
    else:
        arrays = _gathered(codes, ends, bounds)
    parts = [pl.DataFrame([pl.Series(name, values) for name, values in _in_order(part).items()]) for part in arrays]
    return OrderedHistories(parts, _ids(interactions["user"]), _ids(interactions["item"]))


def _slices(codes: pl.DataFrame, bounds: np.ndarray) -> Iterator[pl.DataFrame]:
    """Yield the rows between bounds."""
    for start, end in pairwise(bounds):
        yield codes[start:end]


def _blocks(column: pl.Series) -> Iterator[np.ndarray]:
    """Yield a column some rows at a time."""
    for start in range(0, len(column), ROWS_AT_ONCE):
        yield column[start : start + ROWS_AT_ONCE].to_numpy()


def _bounds(ends: np.ndarray) -> np.ndarray:
    """Return the rows between which the parts lie. ends: int64 [users], the rows after each user's last one."""
    cuts = np.searchsorted(ends, np.arange(ROWS_AT_ONCE, ends[-1], ROWS_AT_ONCE))
    return np.unique([0, *ends[cuts], ends[-1]])


def _gathered(codes: pl.DataFrame, ends: np.ndarray, bounds: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return the columns of parts of whole users, in the order of the source within a part.

    ends: int64 [users], where each user's interactions end in the order of users. bounds: of the parts.
    """
    part_of_user = np.searchsorted(bounds, ends) - 1
    part_of_user = part_of_user.astype(np.uint16 if len(bounds) < RADIX else np.uint32)
    gathered = {name: np.empty(len(codes), codes[name][:0].to_numpy().dtype) for name in codes.columns}
    filled = bounds[:-1].copy()
    for block in codes.iter_slices(ROWS_AT_ONCE):
        parts = part_of_user[block["user"].to_numpy()]
        order = np.argsort(parts, kind="stable")
        counts = np.bincount(parts, minlength=len(filled))
        places = np.arange(len(order)) + np.repeat(filled + counts - np.cumsum(counts), counts)
        for name, values in gathered.items():
            values[places] = block[name].to_numpy()[order]
        filled += counts
    return [{name: values[start:end] for name, values in gathered.items()} for start, end in pairwise(bounds)]


def _in_order(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the columns of a part in the order of histories, in the same memory where it can be written."""
    keys = [_narrow(part[name]) for name in ("user", "part", "timestamp") if name in part]
    if _is_sorted(keys):
        return part
    order = np.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[np.argsort(key[order], kind="stable")]
    for name, values in part.items():
        if values.flags.writeable:
            values[:] = values[order]
        else:
            part[name] = values[order]
    return part


def _narrow(key: np.ndarray) -> np.ndarray:
    """Return integers of the same order, in 16 bits if they fit."""
    lowest = key.min()
    return (key - lowest).astype(np.uint16) if int(key.max()) - int(lowest) < RADIX else key


def _is_sorted(keys: list[np.ndarray]) -> bool:
    """Return True if rows are in order of the first key, then of the next ones."""
    tied = np.ones(len(keys[0]) - 1, bool)
    for key in keys:
        if (tied & (key[1:] < key[:-1])).any():
            return False
        tied &= key[1:] == key[:-1]
    return True


def _ids(column: pl.Series) -> pl.Series:
    """Return the ids of a categorical column by their codes."""
    ids = column.unique()
    codes = ids.to_physical().to_numpy()
    places = np.zeros(codes.max() + 1, np.uint32)
    places[codes] = np.arange(len(ids))
    return ids.gather(places)
