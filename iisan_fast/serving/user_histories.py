"""Hold the histories to rank for, in the item numbers of a catalogue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data import right_align


class UserHistories(NamedTuple):
    """The histories of R users, oldest first, as one jagged array of item numbers. A history may be empty."""

    user_ids: list[str]  # [R]
    offsets: np.ndarray  # int64 [R + 1]: user u has items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 [interactions], each from 1

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of items of each history, int64 [R]."""
        return np.diff(self.offsets)

    def part(self, first: int, end: int) -> UserHistories:
        """Return the histories of the users from `first` to `end` - 1."""
        offsets = self.offsets[first : end + 1]
        return UserHistories(self.user_ids[first:end], offsets - offsets[0], self.items[offsets[0] : offsets[-1]])

    def latest(self, count: int) -> np.ndarray:
        """Return the last `count` items of all histories, right-aligned, int64 [R, count], 0 on the left."""
        return right_align(self.items, self.offsets[1:], self.lengths, count)
