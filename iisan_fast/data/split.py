"""The held-out targets of a split, one a row, with the history of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .jagged_arrays import places, row_blocks

Rows = np.ndarray | slice  # int64, or a range of them
LEAVE_ONE_OUT = {"validation": 2, "test": 1}  # how far from a history's end the target stands


@dataclass(frozen=True)
class Split:
    """Held-out interactions, R in all. All arrays but `items` are int64; padded ones have 0 on the left.

    Only under a given split has a user several targets: rows that follow each other and have the same history. Arrays
    of padded histories take much memory for all rows; they are made for some rows too.
    """

    users: np.ndarray  # [R]: user numbers, ascending; by leave-one-out all, each once
    targets: np.ndarray  # [R]
    lengths: np.ndarray  # [R]: of the histories, all interactions before the targets, whose items ranking may mask
    ends: np.ndarray  # [R]: row r's history is items[ends[r] - lengths[r]:ends[r]]
    items: np.ndarray  # [interactions], int32 or int64
    max_inputs: int

    @cached_property
    def inputs(self) -> np.ndarray:
        """Return the inputs of the sequence encoder for all rows, int64 [R, max_inputs]."""
        return self.inputs_of(slice(None))

    def inputs_of(self, rows: Rows) -> np.ndarray:
        """Return the inputs of the sequence encoder for some rows, int64 [rows, max_inputs]."""
        return right_align(self.items, self.ends[rows], self.lengths[rows], self.max_inputs)

    @property
    def least_width(self) -> int:
        """Return the least width of padded histories."""
        return self.max_inputs + 2

    def part(self, rows: slice) -> Split:
        """Return the split of some consecutive rows."""
        fields = {name: getattr(self, name)[rows] for name in ("users", "targets", "lengths", "ends")}
        return replace(self, **fields)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Return each user's first row, int64 [users]."""
        return np.flatnonzero(np.diff(self.users, prepend=-1))

    @property
    def repeated_users(self) -> np.ndarray | None:
        """Return `users` if a user has several targets, else None."""
        return self.users if len(self.first_rows) < len(self.users) else None

    def padded(self, rows: Rows) -> np.ndarray:
        """Return the histories of some rows, right-aligned, int64 [rows, width].

        width: the longest of them, and at least `least_width`.
        """
        lengths = self.lengths[rows]
        width = int(lengths.max(initial=self.least_width))
        return right_align(self.items, self.ends[rows], lengths, width)

    def latest(self, count: int, rows: Rows = slice(None)) -> np.ndarray:
        """Return the last `count` items of the histories of some rows, by default all, int64 [rows, width].

        They are right-aligned. width: the longest of these histories, at most `count`.
        """
        lengths = self.lengths[rows]
        return right_align(self.items, self.ends[rows], lengths, min(count, int(lengths.max(initial=1))))

    @cached_property
    def history(self) -> np.ndarray:
        """Return all histories, padded: int64 [R, width]. Under a temporal split one long history makes it large."""
        return self.padded(np.arange(len(self.targets)))

    @cached_property
    def reachable(self) -> np.ndarray:
        """Return True for each target that is not in its user's history, bool [R]."""
        if self.repeated_users is not None:
            return self._reachable_by_user()
        reachable = np.ones(len(self.targets), dtype=bool)
        for first, end in row_blocks(self.lengths):
            lengths = self.lengths[first:end]
            rows = np.repeat(np.arange(first, end), lengths)
            history = self.items[places(self.ends[first:end] - lengths, lengths)]
            reachable[rows[history == self.targets[rows]]] = False
        return reachable

    def _reachable_by_user(self) -> np.ndarray:
        """Return `reachable`, and read each user's history once, however many targets the user has."""
        begins = self.first_rows
        lengths = self.lengths[begins]
        width = int(self.items.max()) + 1
        reachable = np.ones(len(self.targets), dtype=bool)
        for first, end in row_blocks(lengths):
            history = self.items[places((self.ends[begins] - lengths)[first:end], lengths[first:end])]
            pairs = np.repeat(self.users[begins[first:end]], lengths[first:end]) * width + history
            rows = slice(begins[first], begins[end] if end < len(begins) else None)
            reachable[rows] = ~np.isin(self.users[rows] * width + self.targets[rows], pairs)
        return reachable


def leave_one_out(offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Return the targets of leave-one-out, int64 [users] by split. offsets: int64 [users + 1]."""
    return {name: offsets[1:] - back for name, back in LEAVE_ONE_OUT.items()}


def right_align(items: np.ndarray, ends: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Return the last `width` of the `lengths` items before each end, int64 [len(ends), width], 0 on the left."""
    back = np.arange(width, 0, -1)
    index = ends[:, None] - back
    aligned = np.where(back <= lengths[:, None], items[np.maximum(index, 0)], 0)
    return aligned.astype(np.int64, copy=False)


def distinct_targets(items: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each target's user among the users, ascending, and the target's item, both int64 [R].

    firsts, counts: int64 [users]; user u's targets are items[firsts[u]:firsts[u] + counts[u]]. A repeated one is left
    out.
    """
    users = np.repeat(np.arange(len(firsts)), counts)
    targets = items[places(firsts, counts)]
    pairs = users * (int(items.max(initial=0)) + 1) + targets
    rows = np.sort(np.unique(pairs, return_index=True)[1])
    return users[rows], targets[rows]
