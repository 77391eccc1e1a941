"""The users' histories as a dataset folder holds them: users.tsv, and times.tsv for a temporal split."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .fast_tables import NeedsStrictReader, fast_or_strict, read_item_numbers, read_whole_numbers
from .strict_tables import read_table
from .temporal import with_times


class Histories(NamedTuple):
    """All users' interactions, oldest first."""

    user_ids: list[str]
    offsets: np.ndarray  # int64 [users + 1]: user u holds items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 [interactions]: numbers from 1, in the order of items.tsv
    times: np.ndarray | None  # int64 [interactions], not falling within a user; None if they were not read


def read_histories(root: Path, item_ids: Sequence[str], timed: bool) -> Histories:
    """Read root/users.tsv, and root/times.tsv if `timed`.

    Raises InputError, with file and line, for a malformed line, a user that occurs twice, an item that is not in
    `item_ids`, and times that do not fit the histories.
    """
    return fast_or_strict(lambda: _read_fast(root, item_ids, timed), lambda: _read_strictly(root, item_ids, timed))


def _read_fast(root: Path, item_ids: Sequence[str], timed: bool) -> Histories:
    """Read the histories by polars. Raises NeedsStrictReader if anything in the files may be wrong."""
    users = read_item_numbers(root / "users.tsv", item_ids)
    offsets = np.concatenate([[0], np.cumsum(users.lengths)])
    if not timed:
        return Histories(users.ids, offsets, users.values, None)
    times = read_whole_numbers(root / "times.tsv")
    if times.ids != users.ids or not np.array_equal(times.lengths, users.lengths):
        raise NeedsStrictReader(f"{root / 'times.tsv'}: not the users or lengths of users.tsv")
    falls = times.values[1:] < times.values[:-1]
    falls[offsets[1:-1] - 1] = False  # from one user's last time to the next user's first
    if falls.any():
        raise NeedsStrictReader(f"{root / 'times.tsv'}: times that fall")
    return Histories(users.ids, offsets, users.values, times.values)


def _read_strictly(root: Path, item_ids: Sequence[str], timed: bool) -> Histories:
    """Read the histories line by line."""
    user_ids: list[str] = []
    lengths = array("q")
    items = array("q")
    times = array("q")
    users = _strict_users(root / "users.tsv", item_ids)
    rows = with_times(users, root / "times.tsv") if timed else zip(users, repeat(None))
    for (user_id, history), user_times in rows:
        user_ids.append(user_id)
        lengths.append(len(history))
        items.extend(history)
        if user_times is not None:
            times.frombytes(user_times.tobytes())
    return Histories(
        user_ids,
        offsets=np.concatenate([[0], np.cumsum(np.array(lengths))]),
        items=np.array(items),
        times=np.array(times) if timed else None,
    )


def _strict_users(path: Path, item_ids: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield (user id, item numbers) of every line. Raises InputError."""
    numbers = {item_id: number for number, item_id in enumerate(item_ids, start=1)}
    lines: dict[str, int] = {}
    for line, (user_id, history) in read_table(path, 2):
        if user_id in lines:
            raise InputError(f"{path} line {line}: user {user_id!r} stands on line {lines[user_id]} already")
        lines[user_id] = line
        try:
            items = [numbers[item_id] for item_id in history.split(" ")]
        except KeyError as error:
            item_id = error.args[0]
            shown = repr(item_id[:100]) + ("..." if len(item_id) > 100 else "")
            problem = f"item {shown} is not in items.tsv" if item_id else "an empty item id (two spaces?)"
            raise InputError(f"{path} line {line}: {problem}") from None
        yield user_id, items
