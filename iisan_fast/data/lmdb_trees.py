"""Check the trees of an LMDB file: each page is used once, lies in the file, and keeps its keys in order."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .lmdb_pages import (
    BRANCH,
    HEADER_BYTES,
    LEAF,
    NO_PAGE,
    OVERFLOW,
    DamagedDatabaseError,
    LmdbSnapshot,
    LmdbTree,
    Nodes,
    nodes_of,
    read_pages,
)

NONE = np.empty(0, dtype=np.int64)
FIRST_PAGE = 2  # after the two meta pages
PAGES_AT_ONCE = 1024
OVERFLOW_LAYOUT = struct.Struct("<qHHI")
COMPARED_AT_ONCE = 64  # bytes of keys that are compared without a loop in Python


def check_trees(descriptor: int, snapshot: LmdbSnapshot, file_bytes: int, writing: bool) -> None:
    """Raise DamagedDatabaseError, naming the page, if LMDB cannot read a snapshot safely and completely.

    The branch pages, the leaf pages and the free list are read. Contents on overflow pages are not, but the headers of
    these pages are if `writing`, because a writer frees pages by them, or if some pages belong to nothing, because a
    leaf may then lead to the wrong ones.
    """
    walk = _Walk(descriptor, snapshot)
    for _ in walk.leaves(snapshot.main, integer_keys=False):
        pass
    free = np.concatenate([NONE, *_free_pages(walk, snapshot)])
    tree_pages = np.concatenate([NONE, *walk.tree_pages])
    starts = np.concatenate([NONE, *walk.overflow_starts])
    counts = np.concatenate([NONE, *walk.overflow_counts])
    end = max((tree_pages + 1).max(initial=FIRST_PAGE), (starts + counts).max(initial=FIRST_PAGE))
    if end * snapshot.page_bytes > file_bytes:
        raise DamagedDatabaseError(f"truncated LMDB: expected {end * snapshot.page_bytes} bytes, found {file_bytes}")
    known_pages = FIRST_PAGE + len(tree_pages) + len(free) + counts.sum()
    if writing or known_pages <= snapshot.last_page:
        counts = walk.recorded_counts(starts, counts)
    _refuse_overlaps(
        np.concatenate([tree_pages, free, starts]),
        np.concatenate([np.ones(len(tree_pages) + len(free), dtype=np.int64), counts]),
    )


@dataclass
class _Walk:
    """The pages that are found on the way through the trees of a snapshot."""

    descriptor: int
    snapshot: LmdbSnapshot
    tree_pages: list[np.ndarray] = field(default_factory=list)  # int64, the numbers of branch and leaf pages
    overflow_starts: list[np.ndarray] = field(default_factory=list)  # int64, of each long content the first page
    overflow_counts: list[np.ndarray] = field(default_factory=list)  # int64, and how many it needs

    def leaves(self, tree: LmdbTree, integer_keys: bool) -> Iterator[Nodes]:
        """Yield the nodes of a tree's leaf pages, in order, some pages at a time.

        Raises DamagedDatabaseError, naming the page, for a page that does not fit the tree.
        """
        if not tree.depth:
            return
        level = np.array([min(tree.root, NO_PAGE)], dtype=np.int64)
        bounds = [b""]  # no key of a page is less
        for _ in range(tree.depth - 1):
            level, bounds = self._children(level, bounds, integer_keys)
        self._use_tree_pages(level)
        entries = 0
        last_key = b""
        for start in range(0, len(level), PAGES_AT_ONCE):
            numbers = level[start : start + PAGES_AT_ONCE]
            nodes = nodes_of(read_pages(self.descriptor, numbers, self.snapshot.page_bytes), numbers, LEAF)
            last_key = _check_order(nodes, numbers, bounds[start : start + PAGES_AT_ONCE], last_key, integer_keys)
            self._use_overflow(nodes)
            entries += len(nodes.rows)
            yield nodes
        if entries != tree.entries:
            raise DamagedDatabaseError(f"expected {tree.entries} entries, found {entries}")

    def content(self, nodes: Nodes, node: int) -> bytes:
        """Return the content of a leaf's node, read from overflow pages if it stands there."""
        if not nodes.long[node]:
            return nodes.value(node)
        size = int(nodes.value_bytes[node])
        start = int(nodes.targets[node])
        numbers = np.arange(start, start + _pages_for(size, self.snapshot.page_bytes))
        pages = read_pages(self.descriptor, numbers, self.snapshot.page_bytes)
        return pages.reshape(-1)[HEADER_BYTES : HEADER_BYTES + size].tobytes()

    def recorded_counts(self, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the counts, int64, that overflow pages record, for contents that need `counts` pages.

        Raises DamagedDatabaseError if one is not the first overflow page of its content.
        """
        headers = np.array([self._overflow_header(start) for start in starts.tolist()], dtype=np.int64).reshape(-1, 2)
        wrong = (headers[:, 0] != starts) | (headers[:, 1] < counts)
        if wrong.any():
            raise DamagedDatabaseError(f"page {starts[np.argmax(wrong)]} is not the overflow page that it should be")
        self._refuse_outside(starts, headers[:, 1])
        return headers[:, 1]

    def _children(self, level: np.ndarray, bounds: list[bytes], integer_keys: bool) -> tuple[np.ndarray, list[bytes]]:
        """Return the pages below branch pages, and the least key of each.

        Raises DamagedDatabaseError, naming the page, if a branch page is wrong.
        """
        self._use_tree_pages(level)
        nodes = nodes_of(read_pages(self.descriptor, level, self.snapshot.page_bytes), level, BRANCH)
        if np.bincount(nodes.rows).min() < 2 and not integer_keys:  # the free list may have a branch of one
            raise DamagedDatabaseError(f"page {level[np.bincount(nodes.rows).argmin()]} is a branch to one page")
        is_first = np.diff(nodes.rows, prepend=-1) > 0
        inner_bounds = [
            bounds[row] if first else _ordered(nodes.key(node), integer_keys)
            for node, (row, first) in enumerate(zip(nodes.rows.tolist(), is_first.tolist()))
        ]
        return nodes.targets, inner_bounds

    def _use_tree_pages(self, numbers: np.ndarray) -> None:
        """Note that branch or leaf pages are in use.

        Raises DamagedDatabaseError if one is no page of the database, or is met twice: the way would have no end.
        """
        self._refuse_outside(numbers, np.ones_like(numbers))
        if len(np.unique(numbers)) < len(numbers):
            raise DamagedDatabaseError("a page is used twice")
        self.tree_pages.append(numbers)

    def _use_overflow(self, nodes: Nodes) -> None:
        """Note the overflow pages of some leaf nodes. Raises DamagedDatabaseError if they are not in the database."""
        starts = nodes.targets[nodes.long]
        counts = _pages_for(nodes.value_bytes[nodes.long], self.snapshot.page_bytes)
        self._refuse_outside(starts, counts)
        self.overflow_starts.append(starts)
        self.overflow_counts.append(counts)

    def _overflow_header(self, number: int) -> tuple[int, int]:
        """Return the page number and the count of pages that an overflow page records; (-1, 0) if it is none."""
        header = os.pread(self.descriptor, OVERFLOW_LAYOUT.size, number * self.snapshot.page_bytes)
        recorded, _, flags, count = OVERFLOW_LAYOUT.unpack(header.ljust(OVERFLOW_LAYOUT.size, b"\0"))
        return (recorded, count) if flags == OVERFLOW else (-1, 0)

    def _refuse_outside(self, starts: np.ndarray, counts: np.ndarray) -> None:
        """Raise DamagedDatabaseError if pages are no pages of the database."""
        outside = (starts < FIRST_PAGE) | (starts + counts > self.snapshot.last_page + 1)
        if outside.any():
            number = starts[np.argmax(outside)]
            raise DamagedDatabaseError(f"page {number} is used, but it has {self.snapshot.last_page + 1} pages")


def _free_pages(walk: _Walk, snapshot: LmdbSnapshot) -> Iterator[np.ndarray]:
    """Yield the page numbers, int64, of each entry of the free list. Raises DamagedDatabaseError if they are wrong."""
    for nodes in walk.leaves(snapshot.free, integer_keys=True):
        for node in range(len(nodes.rows)):
            content = walk.content(nodes, node)
            numbers = np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8")
            if not len(numbers) or numbers[0] > len(numbers) - 1:
                raise DamagedDatabaseError("its free list has an entry that is longer than its room")
            numbers = numbers[1 : 1 + int(numbers[0])]
            falling = (numbers[:-1] > numbers[1:]).all()
            if not falling or (numbers < FIRST_PAGE).any() or (numbers > snapshot.last_page).any():
                raise DamagedDatabaseError("its free list has page numbers out of order or of no page")
            yield numbers.astype(np.int64)


def _refuse_overlaps(starts: np.ndarray, counts: np.ndarray) -> None:
    """Raise DamagedDatabaseError if a page is used twice."""
    order = np.argsort(starts)
    overlap = (starts + counts)[order][:-1] > starts[order][1:]
    if overlap.any():
        raise DamagedDatabaseError(f"page {starts[order][1:][np.argmax(overlap)]} is used twice")


def _check_order(nodes: Nodes, numbers: np.ndarray, bounds: list[bytes], last_key: bytes, integer_keys: bool) -> bytes:
    """Return the last key of some leaf pages, in comparable form. Raises DamagedDatabaseError if keys are out of order.

    bounds: the key of the branch that leads to each page: its keys are not less, those of the page before are.
    last_key: of the page before.
    """
    if integer_keys and (nodes.key_bytes != 8).any():
        raise DamagedDatabaseError(f"page {numbers[0]} or a later one has a key that is not a number of 8 bytes")
    if not integer_keys:
        _refuse_falling(nodes, numbers)
    ends = np.flatnonzero(np.diff(nodes.rows, append=-1)).tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    for number, start, end, bound in zip(numbers.tolist(), starts, ends, bounds):
        inner = range(start, end + 1) if integer_keys else (start, end)
        keys = [_ordered(nodes.key(node), integer_keys) for node in inner]
        if keys[0] < bound or (last_key and last_key >= bound):
            raise DamagedDatabaseError(f"page {number} has keys that belong to another page")
        if integer_keys and keys != sorted(set(keys)):
            raise DamagedDatabaseError(f"page {number} has keys out of order")
        last_key = keys[-1]
    return last_key


def _refuse_falling(nodes: Nodes, numbers: np.ndarray) -> None:
    """Raise DamagedDatabaseError unless each key of a page is greater than the one before it in the page."""
    columns = np.arange(COMPARED_AT_ONCE)
    places = np.minimum(nodes.key_starts[:, None] + columns, len(nodes.content) - 1)
    heads = np.where(columns < nodes.key_bytes[:, None], nodes.content[places], 0).view(">u8")
    differs = heads[:-1] != heads[1:]
    first = differs.argmax(1)[:, None]
    less = np.take_along_axis(heads[:-1], first, 1) < np.take_along_axis(heads[1:], first, 1)
    rising = less[:, 0]
    for node in np.flatnonzero(~differs.any(1)).tolist():  # alike in what was compared
        rising[node] = nodes.key(node) < nodes.key(node + 1)
    wrong = ~rising & (nodes.rows[:-1] == nodes.rows[1:])
    if wrong.any():
        raise DamagedDatabaseError(f"page {numbers[nodes.rows[np.argmax(wrong)]]} has keys out of order")


def _ordered(key: bytes, integer_keys: bool) -> bytes:
    """Return a key such that bytes compare as LMDB compares keys: numbers have their lowest byte first."""
    return key[::-1] if integer_keys else key


def _pages_for(value_bytes: np.ndarray, page_bytes: int) -> np.ndarray:
    """Return the number of overflow pages for contents of these sizes."""
    return (HEADER_BYTES + value_bytes + page_bytes - 1) // page_bytes
