"""Hold the histories to rank for, in the item numbers of a catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...data import right_align
from ...errors import InputError
from ...training import RunFolder


class UserHistories(NamedTuple):
    """The histories of R users, oldest first, as one jagged array of item numbers. A history may be empty."""

    user_ids: list[str]  # [R]
    offsets: np.ndarray  # int64 [R + 1]: user u has items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 [interactions], each from 1
    unknown: int = 0  # item ids that the catalogue does not have, and that were left out

    @classmethod
    def of_run(cls, run: Path) -> UserHistories:
        """Return the whole histories of a run's users, also the targets of validation and test.

        Raises InputError if the run has no histories, as a published one, or if they are damaged.
        """
        folder = RunFolder.open(run)
        if not folder.has_histories:
            raise InputError(f"{run}: has no histories of users (no sequences.npz), as a published run; name histories")
        sequences = folder.sequences
        return cls(sequences.user_ids, sequences.offsets, sequences.items)

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of items of each history, int64 [R]."""
        return np.diff(self.offsets)

    def parts(self, users: int, items: int | None) -> Iterator[UserHistories]:
        """Yield the histories in parts of at most `users` users.

        items: with a number, a part times its longest history has at most so many items, or it is a single user.
        """
        first = longest = 0
        for user, length in enumerate(self.lengths.tolist()):
            longest = max(longest, length)
            count = user + 1 - first
            if count > users or (items is not None and count > 1 and count * longest > items):
                yield self.part(first, user)
                first = user
                longest = length
        yield self.part(first, len(self.user_ids))

    def part(self, first: int, end: int) -> UserHistories:
        """Return the histories of the users from `first` to `end` - 1."""
        offsets = self.offsets[first : end + 1]
        return UserHistories(self.user_ids[first:end], offsets - offsets[0], self.items[offsets[0] : offsets[-1]])

    def latest(self, count: int) -> np.ndarray:
        """Return the last `count` items of all histories, right-aligned, int64 [R, count], 0 on the left."""
        return right_align(self.items, self.offsets[1:], self.lengths, count)
