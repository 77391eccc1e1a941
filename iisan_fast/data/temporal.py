"""The temporal split: two moments, the same for all users, end training and validation.

Interactions before the first moment are trained on. A user's validation target is their first interaction from the
first moment up to the second; their test target is their first one from the second moment on. Interactions of the same
time stay together, and no interaction that is trained on comes after a target.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import ProtocolConfig
from ..errors import InputError
from .strict_tables import read_beside_users

User = tuple[str, Sequence[int]]
TIMES = re.compile(r"[+-]?[0-9]+(?: [+-]?[0-9]+)*")  # int() would also take 1_0 and the digits of other scripts


class SplitHistories(NamedTuple):
    """The part of a jagged array of histories that a split keeps; training ends and targets index into that part."""

    users: np.ndarray  # int64 [kept users]: indices of the users
    starts: np.ndarray  # int64 [kept users]: where the interactions that are kept start in the whole array
    offsets: np.ndarray  # int64 [kept users + 1]: where they start in that part
    training_ends: np.ndarray  # int64 [kept users]
    targets: dict[str, np.ndarray]  # int64 [kept users] under `validation` and `test`: the first target, -1 for none
    target_counts: dict[str, np.ndarray] | None = None  # int64 [kept users] by split; None for one a user
    without_history: dict[str, int] | None = None  # targets by split that no interaction comes before; None: not known


def with_times(users: Iterable[User], path: Path) -> Iterator[tuple[User, np.ndarray]]:
    """Yield every (user id, items) with its times, int64 [items]. `path` holds the times as users.tsv holds the items.

    Raises InputError, with file and line, if the two files do not fit together, or if times are not whole numbers in
    order.
    """
    if not os.path.lexists(path):
        writes = "iisan-fast import writes it where the source has timestamps"
        raise InputError(f"{path}: no such file; a temporal split needs it, and {writes}")
    for where, text, user in read_beside_users(path, users):
        times = _times(text, where)
        if len(times) != len(user[1]):
            raise InputError(f"{where}: expected {len(user[1])} times, one an interaction, found {len(times)}")
        yield user, times


def temporal_split(offsets: np.ndarray, times: np.ndarray, protocol: ProtocolConfig) -> SplitHistories:
    """Split histories at two moments: the quantiles validation_from and test_from of all times.

    offsets: int64 [users + 1]; user u's times are times[offsets[u]:offsets[u + 1]], which do not fall. All interactions
    before a target are its history; a target without a history is dropped. A user keeps at most max_inputs + 1
    interactions before the first moment, and those after it up to their last target. A user without a target and with
    fewer than two interactions to train on is dropped. Raises InputError if a part would be empty.
    """
    moments = np.quantile(times, [protocol.validation_from, protocol.test_from], method="higher")
    where = f"validation_from, test_from: split at the times {moments[0]} and {moments[1]}"
    if moments[0] == moments[1]:
        raise InputError(f"{where}, which are one; set the two shares further apart")
    starts, ends = offsets[:-1], offsets[1:]
    first, second = (starts + np.add.reduceat(times < moment, starts, dtype=np.int64) for moment in moments)
    targets = {"validation": _targets(starts, first, second), "test": _targets(starts, second, ends)}
    last = np.maximum(targets["validation"], targets["test"])
    starts = np.maximum(starts, first - (protocol.max_inputs + 1))
    trained = first - starts >= 2
    for name, users in {"training": trained, **{name: ends >= 0 for name, ends in targets.items()}}.items():
        if not users.any():
            raise InputError(f"{where}, which leaves nothing for {name}; choose other shares")
    stops = np.where(last >= 0, last + 1, first)
    return split_histories(np.flatnonzero(trained | (last >= 0)), starts, stops, first, targets)


def split_histories(
    users: np.ndarray, starts: np.ndarray, stops: np.ndarray, training_ends: np.ndarray, targets: dict[str, np.ndarray]
) -> SplitHistories:
    """Return the part of a jagged array that holds the interactions from `starts` up to `stops` of chosen users.

    users: int64, indices of the chosen users. starts, stops, training_ends, targets: int64 of all users, indices in the
    whole array; a target is -1 for none.
    """
    lengths = (stops - starts)[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    moved = offsets[:-1] - starts[users]
    return SplitHistories(
        users=users,
        starts=starts[users],
        offsets=offsets,
        training_ends=training_ends[users] + moved,
        targets={name: np.where(places[users] >= 0, places[users] + moved, -1) for name, places in targets.items()},
    )


def _targets(starts: np.ndarray, first: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return each user's target, `first`, or -1 if no interaction is in [first, ends) or none in [starts, first)."""
    return np.where((starts < first) & (first < ends), first, -1)


def _times(text: str, where: str) -> np.ndarray:
    """Return a line's times, int64. Raises InputError, naming `where`, unless they are whole numbers in order."""
    expected = "expected whole numbers of 64 bits, one space between"
    if not TIMES.fullmatch(text):
        unfit = next(word for word in text.split(" ") if not TIMES.fullmatch(word))
        raise InputError(f"{where}: {expected}, found {unfit[:60]!r}")
    try:
        times = np.array(text.split(" "), dtype=np.int64)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: {expected}, found one with more digits") from None
    falls = np.flatnonzero(times[1:] < times[:-1])
    if len(falls):
        earlier, later = times[falls[0] : falls[0] + 2]
        raise InputError(f"{where}: expected times in order, found {later} after {earlier}; sort the interactions")
    return times
