"""Count which items the same users took near one another: a sparse co-occurrence matrix, and a history's sums over it.

For each training pair of one user in which item j comes k = 1 … 9 places after item i, C[i, j] += 1 / k and
C[j, i] += 0.6 / k, without the diagonal. Each row is then divided by the square root of its sum, at least 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import numpy as np
from scipy.sparse import csr_array

from ..data import Sequences, places, row_blocks

REACH = 9  # places between the items of a pair, at most
BACKWARD = 0.6  # weight of a pair for the later item, beside 1 for the earlier one
DECAY = 0.7  # of an item's weight in a history for each newer item
RECENT = 48  # items of a history that count; 0.7^48 is below the precision of float32

UNITS = 12_600  # of a weight of 1: every UNITS / k and BACKWARD * UNITS / k is whole, so that sums of units are exact
PAIRS_OF_AN_ITEM = 2 * REACH
BYTES_PER_PAIR = 12  # an int32 item and an int64 weight
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class CoOccurrence:
    """The strongest neighbours of each item, as a sparse matrix [items, items] of compressed rows."""

    offsets: np.ndarray  # int64 [items + 1]: item number i has the entries offsets[i - 1]:offsets[i]
    items: np.ndarray  # int32 [entries]: columns, item number i in column i - 1, ascending within a row
    values: np.ndarray  # float32 [entries], above 0

    @classmethod
    def of(cls, sequences: Sequences, neighbours: int, block_bytes: int = BLOCK_BYTES) -> CoOccurrence:
        """Build the matrix from the training interactions of all users.

        neighbours: entries to keep of each row, the strongest; of equal ones those with the lower item number. The cut
        comes after the division by the root of the row's whole sum. block_bytes: memory that the pairs of the rows in
        work may take; the result is the same, bit for bit, for any.
        """
        pairs = _Pairs(sequences)
        most = max(1, block_bytes // (PAIRS_OF_AN_ITEM * BYTES_PER_PAIR))
        blocks = [_strongest(pairs.units(first, end, most), neighbours) for first, end in pairs.blocks(most)]
        lengths, columns, values = (np.concatenate(parts) for parts in zip(*blocks))
        return cls(np.concatenate([[0], np.cumsum(lengths)]), columns, values)

    def sums(self, histories: np.ndarray) -> csr_array:
        """Return M, the sum over each history of 0.7^age C[item, ·], float32 [R, items], columns ascending.

        histories: item numbers, int64 [R, width], right-aligned, 0 for padding; the last column has age 0. An item that
        occurs twice counts twice. The `RECENT` last items count, and an item number beyond the matrix has no
        neighbours.
        """
        recent = histories[:, -RECENT:]
        known = (recent > 0) & (recent < len(self.offsets))
        weights = np.float32(DECAY) ** np.arange(recent.shape[1] - 1, -1, -1, dtype=np.float32)
        offsets = np.concatenate([[0], np.cumsum(known.sum(axis=1))])
        entries = np.broadcast_to(weights, recent.shape)[known], (recent[known] - 1).astype(np.int32), _narrow(offsets)
        sums = csr_array(entries, shape=(len(recent), self._matrix.shape[0])) @ self._matrix
        sums.sort_indices()
        return sums

    @cached_property
    def _matrix(self) -> csr_array:
        """Return the matrix as scipy's, over the same memory."""
        items = len(self.offsets) - 1
        return csr_array((self.values, self.items, _narrow(self.offsets)), shape=(items, items))


class _Pairs:
    """The training pairs, to be enumerated by the item of their row.

    A place is an index of an interaction in the sequences' items, which may lie in a file.
    """

    def __init__(self, sequences: Sequences) -> None:
        """Sort the places of the training interactions by item, some users' at a time."""
        count = len(sequences.items)
        self.items = len(sequences.item_ids)
        self.interactions = sequences.items
        self.ends = np.cumsum(sequences.training_counts[1:])  # of each item in by_item
        self.before = np.empty(count, dtype=np.int8)
        self.after = np.empty(count, dtype=np.int8)
        self.by_item = np.empty(self.ends[-1], dtype=np.int32 if count <= np.iinfo(np.int32).max else np.int64)
        filled = self.ends - sequences.training_counts[1:]
        for first, end in row_blocks(sequences.training_lengths):
            lengths = sequences.training_lengths[first:end]
            starts = np.repeat(sequences.offsets[first:end], lengths)
            here = places(sequences.offsets[first:end], lengths)
            self.before[here] = np.minimum(here - starts, REACH)
            self.after[here] = np.minimum(starts + np.repeat(lengths, lengths) - here - 1, REACH)
            columns = self._columns(here)
            order = np.argsort(columns, kind="stable")
            counts = np.bincount(columns, minlength=self.items)
            moved = filled - (np.cumsum(counts) - counts)
            self.by_item[np.arange(len(here)) + np.repeat(moved, counts)] = here[order]
            filled += counts

    def _columns(self, here: np.ndarray) -> np.ndarray:
        """Return the columns of the items at some places, int32."""
        return (self.interactions[here] - 1).astype(np.int32, copy=False)

    def blocks(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield (first row, end) of blocks with at most `most` interactions, or of one row that has more."""
        first = 0
        while first < self.items:
            start = self.ends[first - 1] if first else 0
            end = max(first + 1, int(np.searchsorted(self.ends, start + most, side="right")))
            yield first, end
            first = end

    def units(self, first: int, end: int, most: int) -> csr_array:
        """Return the rows from `first` to `end` of the matrix in `UNITS`, int64 [end - first, items].

        At most `most` interactions are in work at a time. Columns are in no order, and each occurs once in a row.
        """
        start = int(self.ends[first - 1]) if first else 0
        stop = int(self.ends[end - 1])
        parts = range(start, stop, most) or [start]
        units = reduce(add, (self._units_of(first, end, part, min(part + most, stop)) for part in parts))
        units.eliminate_zeros()
        return units

    def _units_of(self, first: int, end: int, start: int, stop: int) -> csr_array:
        """Return the units of the interactions by_item[start:stop], all of rows from `first` to `end`.

        The product of two matrices adds them up: row by interaction, and interaction by neighbour.
        """
        here = self.by_item[start:stop]
        centre = self._columns(here)
        neighbours = np.repeat(centre[:, None], PAIRS_OF_AN_ITEM, axis=1)
        units = np.zeros(neighbours.shape, dtype=np.int64)
        for k in range(1, REACH + 1):
            for column, room, step, weight in (
                (k - 1, self.after, k, UNITS // k),
                (REACH + k - 1, self.before, -k, round(BACKWARD * UNITS) // k),
            ):
                rows = np.flatnonzero(room[here] >= k)
                neighbours[rows, column] = self._columns(here[rows] + step)
                units[rows, column] = weight
        units[neighbours == centre[:, None]] = 0
        width = np.arange(len(here) + 1) * PAIRS_OF_AN_ITEM
        of_interactions = csr_array((units.ravel(), neighbours.ravel(), width), shape=(len(here), self.items))
        ends = np.clip(self.ends[first:end] - start, 0, len(here))
        ones = np.ones(len(here), dtype=np.int64)
        of_rows = csr_array((ones, np.arange(len(here)), np.concatenate([[0], ends])), shape=(end - first, len(here)))
        return of_rows @ of_interactions


def _strongest(units: csr_array, neighbours: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lengths of rows, their columns and their normalised values, with at most `neighbours` a row."""
    units.sort_indices()
    lengths = np.diff(units.indptr)
    sums = np.asarray(units.sum(axis=1)) / UNITS
    remaining = np.ones(units.nnz, dtype=bool)
    for row in np.flatnonzero(lengths > neighbours):
        start, end = units.indptr[row : row + 2]
        order = np.argsort(-units.data[start:end], kind="stable")
        remaining[start + order[neighbours:]] = False
    values = units.data / (UNITS * np.repeat(np.sqrt(np.maximum(sums, 1)), lengths))
    return (
        np.minimum(lengths, neighbours).astype(np.int64),
        units.indices[remaining].astype(np.int32),
        values[remaining].astype(np.float32),
    )


def _narrow(offsets: np.ndarray) -> np.ndarray:
    """Return offsets as int32 where they fit: beside int32 columns, scipy then copies no columns."""
    return offsets.astype(np.int32) if offsets[-1] <= np.iinfo(np.int32).max else offsets
