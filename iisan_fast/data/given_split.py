"""The given split: splits.tsv divides each user's interactions into training, validation and test.

A line holds a user id and three whole numbers, how many interactions of the user are in each part. users.tsv holds the
interactions in that order. A user may have several targets, all with the same history: those of validation have the
training part, those of the test the training and the validation part.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from .fast_tables import NeedsStrictReader, fast_or_strict, read_whole_numbers
from .strict_tables import read_beside_users
from .temporal import SplitHistories, split_histories

LOGGER = logging.getLogger(__name__)
PARTS = ("training", "validation", "test")
COUNT = re.compile("[+-]?0{0,99}[0-9]{1,18}")  # int() would also take 1_0 and the digits of other scripts
REASONS = {
    "validation": "the best checkpoint is chosen by them",
    "test": "the best checkpoint is tested by them",
}
WRITERS = "iisan-fast import writes it from a split column, from three files, or from RecBole's benchmark files"


def read_parts(path: Path, user_ids: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Return how many interactions of each user are in training, validation and test, int64 [users, 3].

    path: of splits.tsv. user_ids, lengths: of users.tsv. Raises InputError, with file and line, if the file is missing,
    or if its users or counts do not fit.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; a given split needs it, and {WRITERS}")
    return fast_or_strict(lambda: _read_fast(path, user_ids, lengths), lambda: _read_strictly(path, user_ids, lengths))


def report_unread(path: Path, split: str) -> None:
    """Say that a dataset has a given split if another one is chosen. path: of splits.tsv."""
    if split != "given" and path.exists():
        LOGGER.warning("%s: not read, since the split is %s; choose it with --split given", path, split)


def given_split(offsets: np.ndarray, parts: np.ndarray, max_inputs: int, path: Path) -> SplitHistories:
    """Split histories by the counts of `read_parts`.

    offsets: int64 [users + 1]. parts: int64 [users, 3]. path: of splits.tsv, for messages. A target without a history
    is left out and counted. A user keeps at most max_inputs + 1 interactions of training, and those after it up to
    their last target. A user without a target and with fewer than two interactions to train on is left out. Raises
    InputError if nobody is left for a part.
    """
    starts, ends = offsets[:-1], offsets[1:]
    first = starts + parts[:, 0]
    second = first + parts[:, 1]
    bounds = {"validation": (first, second), "test": (second, ends)}
    targets = {}
    counts = {}
    without_history = {}
    stops = first  # where the kept interactions end
    for name, (begin, end) in bounds.items():
        targets[name] = np.where((starts < begin) & (begin < end), begin, -1)
        counts[name] = np.where(targets[name] >= 0, end - begin, 0)
        without_history[name] = int((end - begin)[starts == begin].sum())
        stops = np.where(targets[name] >= 0, end, stops)
    starts = np.maximum(starts, first - (max_inputs + 1))
    trained = first - starts >= 2
    _refuse_empty(trained, targets, without_history, path)
    users = np.flatnonzero(trained | (counts["validation"] > 0) | (counts["test"] > 0))
    target_counts = {name: of_users[users] for name, of_users in counts.items()}
    split = split_histories(users, starts, stops, first, targets)
    return split._replace(target_counts=target_counts, without_history=without_history)


def _refuse_empty(
    trained: np.ndarray, targets: dict[str, np.ndarray], without_history: dict[str, int], path: Path
) -> None:
    """Raise InputError if no user is trained on or has a target."""
    if not trained.any():
        raise InputError(f"{path}: expected users with two training interactions or more, found none")
    for name, places in targets.items():
        if not (places >= 0).any():
            left_out = without_history[name]
            without = f" but {left_out:,} without an interaction before them" if left_out else ""
            raise InputError(
                f"{path}: expected {name} targets, found none{without}; {REASONS[name]}; hold out interactions for "
                f"{name} and import again, or train by another split"
            )


def report_left_out(path: Path, without_history: Mapping[str, int] | None) -> None:
    """Warn of targets without a history, by split; None: there are none. path: of splits.tsv."""
    if without_history and (left_out := sum(without_history.values())):
        shown = ", ".join(f"{count:,} of {name}" for name, count in without_history.items())
        LOGGER.warning("%s: %s targets have no interaction before them and are left out: %s", path, left_out, shown)


def _read_fast(path: Path, user_ids: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Read the counts by polars. Raises NeedsStrictReader if anything in the file may be wrong."""
    rows = read_whole_numbers(path, user_ids)
    if (rows.lengths != len(PARTS)).any():
        raise NeedsStrictReader(f"{path}: not three numbers a user")
    parts = rows.values.reshape(-1, len(PARTS))
    if ((parts < 0) | (parts > lengths[:, None])).any() or (parts.sum(axis=1) != lengths).any():
        raise NeedsStrictReader(f"{path}: not the lengths of users.tsv")
    return parts


def _read_strictly(path: Path, user_ids: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Read the counts line by line. Raises InputError, with file and line."""
    parts = np.empty((len(user_ids), len(PARTS)), dtype=np.int64)
    expected_users = zip(user_ids, lengths.tolist())
    for row, (where, text, user) in enumerate(read_beside_users(path, expected_users)):
        parts[row] = _counts(text, user[1], where)
    return parts


def _counts(text: str, interactions: int, where: str) -> list[int]:
    """Return the three counts of a user with so many interactions. Raises InputError, naming `where`."""
    words = text.split(" ")
    fits = len(words) == len(PARTS) and all(map(COUNT.fullmatch, words))
    counts = [int(word) for word in words] if fits else [-1]
    if min(counts) < 0:
        raise InputError(
            f"{where}: expected three whole numbers, the interactions in {', '.join(PARTS[:-1])} and {PARTS[-1]}, one "
            f"space between, found {text[:60]!r}"
        )
    if sum(counts) != interactions:
        raise InputError(
            f"{where}: expected counts of the {interactions} interactions in users.tsv, found "
            f"{' + '.join(map(str, counts))} = {sum(counts)}"
        )
    return counts
