"""The users' histories as a dataset folder holds them: users.tsv, and times.tsv for a temporal split."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .fast_tables import NeedsStrictReader, fast_or_strict, read_item_numbers, read_whole_numbers
from .growing_arrays import IN_MEMORY, GrowingArrays, GrowingTexts
from .strict_tables import read_table
from .temporal import User, with_times
from .text_array import first_repeat

USERS_AT_ONCE = 1 << 12  # that are read line by line


class Histories(NamedTuple):
    """All users' interactions, oldest first."""

    user_ids: Sequence[str]
    offsets: np.ndarray  # int64 [users + 1]: user u holds items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 or int32 [interactions]: numbers from 1, in the order of items.tsv
    times: np.ndarray | None  # int64 [interactions], not falling within a user; None if they were not read


def read_histories(root: Path, item_ids: Sequence[str], timed: bool, arrays: GrowingArrays = IN_MEMORY) -> Histories:
    """Read root/users.tsv, and root/times.tsv if `timed`. arrays: take what is read.

    Raises InputError, with file and line, for a malformed line, a user that occurs twice, an item that is not in
    `item_ids`, and times that do not fit the histories. Raises OSError if there is no room for the arrays.
    """
    return fast_or_strict(
        lambda: _read_fast(root, item_ids, timed, arrays), lambda: _read_strictly(root, item_ids, timed, arrays)
    )


def _read_fast(root: Path, item_ids: Sequence[str], timed: bool, arrays: GrowingArrays) -> Histories:
    """Read the histories by polars. Raises NeedsStrictReader if anything in the files may be wrong."""
    users = read_item_numbers(root / "users.tsv", item_ids, arrays)
    offsets = np.concatenate([[0], np.cumsum(users.lengths)])
    if not timed:
        return Histories(users.ids, offsets, users.values, None)
    times = read_whole_numbers(root / "times.tsv", users.ids, arrays)
    if not np.array_equal(times.lengths, users.lengths):
        raise NeedsStrictReader(f"{root / 'times.tsv'}: not the lengths of users.tsv")
    falls = times.values[1:] < times.values[:-1]
    falls[offsets[1:-1] - 1] = False  # from one user's last time to the next user's first
    if falls.any():
        raise NeedsStrictReader(f"{root / 'times.tsv'}: times that fall")
    return Histories(users.ids, offsets, users.values, times.values)


def _read_strictly(root: Path, item_ids: Sequence[str], timed: bool, arrays: GrowingArrays) -> Histories:
    """Read the histories line by line. Raises InputError."""
    path = root / "users.tsv"
    ids = arrays.texts("row_ids")
    lengths = array("q")
    items = arrays.array("items", arrays.item_dtype)
    times = arrays.array("times", np.int64)
    users = _strict_users(path, item_ids, ids)
    rows = with_times(users, root / "times.tsv") if timed else zip(users, repeat(None))
    try:
        while block := _strict_block(islice(rows, USERS_AT_ONCE)):
            lengths.extend(block[0])
            items.append(np.array(block[1]))
            times.append(np.array(block[2]))
    except InputError:
        _refuse_repeat(path, ids.finish())  # which comes before the line of the error
        raise
    user_ids = ids.finish()
    _refuse_repeat(path, user_ids)
    return Histories(
        user_ids,
        offsets=np.concatenate([[0], np.cumsum(np.array(lengths))]),
        items=items.finish(),
        times=times.finish() if timed else None,
    )


def _strict_block(rows: Iterable[tuple[User, np.ndarray | None]]) -> tuple[array[int], array[int], array[int]] | None:
    """Return the lengths, the items and the times of some users, one after the other; None of no users.

    The numbers are taken out of the lists at once: many lists would keep Python's garbage collector at work. Raises
    InputError as `rows` does.
    """
    lengths, items, times = array("q"), array("q"), array("q")
    for (_, history), user_times in rows:
        lengths.append(len(history))
        items.extend(history)
        if user_times is not None:
            times.frombytes(user_times.tobytes())
    return (lengths, items, times) if lengths else None


def _refuse_repeat(path: Path, user_ids: Sequence[str]) -> None:
    """Raise InputError if a user stands on two lines."""
    if repeat_of := first_repeat(user_ids):
        number, before = repeat_of
        raise InputError(f"{path} line {number + 1}: user {user_ids[number]!r} stands on line {before + 1} already")


def _strict_users(path: Path, item_ids: Sequence[str], ids: GrowingTexts) -> Iterator[tuple[str, list[int]]]:
    """Yield (user id, item numbers) of every line, and add the id to `ids` before. Raises InputError."""
    numbers = {item_id: number for number, item_id in enumerate(item_ids, start=1)}
    for line, (user_id, history) in read_table(path, 2):
        ids.extend([user_id])
        try:
            items = [numbers[item_id] for item_id in history.split(" ")]
        except KeyError as error:
            item_id = error.args[0]
            shown = repr(item_id[:100]) + ("..." if len(item_id) > 100 else "")
            problem = f"item {shown} is not in items.tsv" if item_id else "an empty item id (two spaces?)"
            raise InputError(f"{path} line {line}: {problem}") from None
        yield user_id, items
