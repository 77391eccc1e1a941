"""The held-out targets of a split, one a row, with the history of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Split:
    """Held-out interactions, R in all. All arrays are int64; padded ones have 0 on the left.

    Only under a given split has a user several targets: rows that follow each other and have the same history.
    """

    users: np.ndarray  # [R]: user numbers, ascending; by leave-one-out all, each once
    inputs: np.ndarray  # [R, max_inputs]: what the sequence encoder reads
    targets: np.ndarray  # [R]
    lengths: np.ndarray  # [R]: of the histories, all interactions before the targets, whose items ranking may mask
    ends: np.ndarray  # [R]: row r's history is items[ends[r] - lengths[r]:ends[r]]
    items: np.ndarray  # [interactions]
    least_width: int  # of padded histories

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Return each user's first row, int64 [users]."""
        return np.flatnonzero(np.diff(self.users, prepend=-1))

    @property
    def repeated_users(self) -> np.ndarray | None:
        """Return `users` if a user has several targets, else None."""
        return self.users if len(self.first_rows) < len(self.users) else None

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Return the histories of some rows, right-aligned, int64 [len(rows), width].

        width: the longest of them, and at least `least_width`.
        """
        lengths = self.lengths[rows]
        width = int(lengths.max(initial=self.least_width))
        return right_align(self.items, self.ends[rows], lengths, width)

    def latest(self, count: int) -> np.ndarray:
        """Return the last `count` items of all histories, right-aligned, int64 [R, width].

        width: the longest history, at most `count`.
        """
        return right_align(self.items, self.ends, self.lengths, min(count, int(self.lengths.max(initial=1))))

    @cached_property
    def history(self) -> np.ndarray:
        """Return all histories, padded: int64 [R, width]. Under a temporal split one long history makes it large."""
        return self.padded(np.arange(len(self.targets)))

    @cached_property
    def reachable(self) -> np.ndarray:
        """Return True for each target that is not in its user's history, bool [R]."""
        if self.repeated_users is not None:
            return self._reachable_by_user()
        rows = np.repeat(np.arange(len(self.targets)), self.lengths)
        before = np.cumsum(self.lengths) - self.lengths
        history = self.items[np.arange(len(rows)) + np.repeat(self.ends - self.lengths - before, self.lengths)]
        return np.bincount(rows[history == self.targets[rows]], minlength=len(self.targets)) == 0

    def _reachable_by_user(self) -> np.ndarray:
        """Return `reachable`, and read each user's history once, however many targets the user has."""
        first = self.first_rows
        lengths = self.lengths[first]
        before = np.cumsum(lengths) - lengths
        history = self.items[np.arange(lengths.sum()) + np.repeat(self.ends[first] - lengths - before, lengths)]
        width = int(self.items.max()) + 1
        pairs = np.repeat(self.users[first], lengths) * width + history
        return ~np.isin(self.users * width + self.targets, pairs)


def right_align(items: np.ndarray, ends: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Return the last `width` of the `lengths` items before each end, int64 [len(ends), width], 0 on the left."""
    back = np.arange(width, 0, -1)
    index = ends[:, None] - back
    return np.where(back <= lengths[:, None], items[np.maximum(index, 0)], 0)


def distinct_targets(items: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each target's user among the users, ascending, and the target's item, both int64 [R].

    firsts, counts: int64 [users]; user u's targets are items[firsts[u]:firsts[u] + counts[u]]. A repeated one is left
    out.
    """
    users = np.repeat(np.arange(len(firsts)), counts)
    before = np.cumsum(counts) - counts
    targets = items[np.arange(len(users)) + (firsts - before)[users]]
    pairs = users * (int(items.max(initial=0)) + 1) + targets
    rows = np.sort(np.unique(pairs, return_index=True)[1])
    return users[rows], targets[rows]
