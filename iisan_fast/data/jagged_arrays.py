"""Index rows of different lengths that lie one after the other in one array, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ELEMENTS_AT_ONCE = 1 << 22  # an int64 for each takes 32 MiB


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the indices of the elements of all rows, one row after the other, int64.

    Row r has the elements from starts[r] to below starts[r] + lengths[r].
    """
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def row_blocks(lengths: np.ndarray, most: int = ELEMENTS_AT_ONCE) -> Iterator[tuple[int, int]]:
    """Yield (first row, end) of rows that follow each other and have at most `most` elements, or of one longer row."""
    first = 0
    while first < len(lengths):
        sums = np.cumsum(lengths[first : first + most])
        end = first + max(1, int(np.searchsorted(sums, most, side="right")))
        yield first, end
        first = end
