"""Read pages of an LMDB file without LMDB, and refuse pages in which LMDB would read outside of the file or the page.

The layout is that of LMDB 0.9 on 64 bits: pages of one size, numbered from 0. Pages 0 and 1 are meta pages, each the
root of a snapshot. A branch page leads to other pages by their numbers, a leaf page holds keys and contents, and a long
content stands on overflow pages of its own.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np

BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8  # the flags of a page, one in each
LONG_CONTENT, DATABASE = 1, 2  # the flags of a node: it stands on overflow pages, it is the root of a named database
INTEGER_KEYS = 8
NO_SUBFOLDER = 0x4000  # LMDB keeps this option of the environment among the flags of the free list
HEADER_BYTES = 16
NODE_BYTES = 8  # before a node's key
LONGEST_KEY = 511
DEEPEST = 32
NO_PAGE = 2**48  # greater than every page number
NO_ROOT = 2**64 - 1
MAGIC, VERSION = 0xBEEFC0DE, 1
META_LAYOUT = struct.Struct("<QHHHH IIQQ IHHQQQQQ IHHQQQQQ QQ")  # of a meta page, from its first byte
UNWRITTEN = 131_072  # pages at the end that a transaction may take and never write


class DamagedDatabaseError(Exception):
    """A page that LMDB must not read. The message says which page and why, without the file."""


@dataclass(frozen=True)
class LmdbTree:
    """One of the two trees of a snapshot: the free list, or the entries."""

    flags: int
    depth: int  # levels of pages; 0 if it is empty
    entries: int
    root: int  # a page number


@dataclass(frozen=True)
class LmdbSnapshot:
    """A state of the database that one transaction has written: the content of a meta page."""

    transaction: int
    page_bytes: int
    last_page: int  # the highest page number that may be in use
    free: LmdbTree
    main: LmdbTree


@dataclass(frozen=True)
class Nodes:
    """The nodes of some branch pages or leaf pages, N in all, in the order of their keys."""

    content: np.ndarray  # uint8, the bytes of all pages
    rows: np.ndarray  # int64 [N]: the row of each node's page among the pages that were passed
    key_starts: np.ndarray  # int64 [N]: indices into `content`
    key_bytes: np.ndarray  # int64 [N]
    value_bytes: np.ndarray  # int64 [N]: of a leaf's contents; 0 in branch pages
    long: np.ndarray  # bool [N]: whose contents stand on overflow pages
    targets: np.ndarray  # int64 [N]: the child's page number, or the first overflow page; -1 for none

    def key(self, node: int) -> bytes:
        """Return the key of a node."""
        start = int(self.key_starts[node])
        return self.content[start : start + int(self.key_bytes[node])].tobytes()

    def value(self, node: int) -> bytes:
        """Return the content of a leaf's node that does not stand on overflow pages."""
        start = int(self.key_starts[node] + self.key_bytes[node])
        return self.content[start : start + int(self.value_bytes[node])].tobytes()


def read_snapshots(descriptor: int) -> list[LmdbSnapshot]:
    """Return the snapshots of an open LMDB file's two meta pages, the newer one first: LMDB reads that one.

    Raises DamagedDatabaseError if one of the pages is no meta page of an LMDB that can be read.
    """
    first = _read_snapshot(descriptor, 0, 0)
    second = _read_snapshot(descriptor, first.page_bytes, 1)
    if second.page_bytes != first.page_bytes:
        raise DamagedDatabaseError("its meta pages give two sizes of pages")
    return [second, first] if second.transaction > first.transaction else [first, second]


def check_snapshot(snapshot: LmdbSnapshot, file_bytes: int) -> None:
    """Raise DamagedDatabaseError unless the numbers of a snapshot fit each other and a file of `file_bytes` bytes."""
    file_pages = file_bytes // snapshot.page_bytes
    if not 1 <= snapshot.last_page < file_pages + UNWRITTEN:
        raise DamagedDatabaseError(
            f"truncated LMDB: expected {(snapshot.last_page + 1) * snapshot.page_bytes} bytes, found {file_bytes}"
        )
    if snapshot.free.flags & ~NO_SUBFOLDER != INTEGER_KEYS or snapshot.main.flags:
        flags = f"{snapshot.free.flags:#x} and {snapshot.main.flags:#x}"
        raise DamagedDatabaseError(f"expected plain keys without duplicates, found the flags {flags}")
    for name, tree in (("free list", snapshot.free), ("tree", snapshot.main)):
        empty = tree.root == NO_ROOT
        if tree.depth > DEEPEST or empty != (tree.depth == 0) or empty != (tree.entries == 0):
            root = "no root" if empty else f"the root {tree.root}"
            raise DamagedDatabaseError(f"its {name} has {root}, {tree.depth} levels and {tree.entries} entries")


def read_pages(descriptor: int, numbers: np.ndarray, page_bytes: int) -> np.ndarray:
    """Return pages by their numbers, uint8 [len(numbers), page_bytes]. Pages that follow each other are read at once.

    Raises DamagedDatabaseError if the file ends before a page does.
    """
    pages = np.empty((len(numbers), page_bytes), dtype=np.uint8)
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1).tolist()
    for start, end in zip(starts, [*starts[1:], len(numbers)]):
        buffer = memoryview(pages[start:end]).cast("B")
        position = int(numbers[start]) * page_bytes
        while buffer:
            count = os.preadv(descriptor, [buffer], position)
            if not count:
                raise DamagedDatabaseError(f"truncated LMDB: the file ends before byte {position + len(buffer)}")
            buffer, position = buffer[count:], position + count
    return pages


def nodes_of(pages: np.ndarray, numbers: np.ndarray, kind: int) -> Nodes:
    """Return the nodes of pages, uint8 [pages, page_bytes], which have the given numbers.

    kind: BRANCH or LEAF. Raises DamagedDatabaseError, naming the page, if a page is of another kind, if its nodes do
    not fill their part of the page without gap or overlap, or if a key is too long.
    """
    page_bytes = pages.shape[1]
    words = pages.view("<u2").astype(np.int64)
    upper = words[:, 7]
    count = (words[:, 6] - HEADER_BYTES) // 2
    kind_name = "branch" if kind == BRANCH else "leaf"
    _refuse_pages(pages.view("<i8")[:, 0] != numbers, numbers, "has the number of another page")
    _refuse_pages(words[:, 5] != kind, numbers, f"is no {kind_name} page")
    in_order = (words[:, 6] % 2 == 0) & (words[:, 6] <= upper) & (upper <= page_bytes) & (upper % 2 == 0)
    _refuse_pages(~in_order | (count < 1), numbers, "has no room for its nodes")

    rows = np.repeat(np.arange(len(pages)), count)
    slots = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    offsets = words[rows, HEADER_BYTES // 2 + slots]
    fits = (offsets % 2 == 0) & (offsets >= upper[rows]) & (offsets <= page_bytes - NODE_BYTES)
    _refuse_pages(~fits, numbers[rows], "has a node outside of its room")

    low, high, flags, key_bytes = (words[rows, offsets // 2 + part] for part in range(4))
    long = np.zeros(len(rows), dtype=bool)
    value_bytes = np.zeros(len(rows), dtype=np.int64)
    if kind == LEAF:
        long = flags == LONG_CONTENT
        value_bytes = low | (high << 16)
        is_database = (flags == DATABASE) & (value_bytes == struct.calcsize("<IHHQQQQQ"))
        _refuse_pages((flags != 0) & ~long & ~is_database, numbers[rows], "has a node of an unknown kind")
        _refuse_pages(key_bytes == 0, numbers[rows], "has an empty key")
    _refuse_pages(key_bytes > LONGEST_KEY, numbers[rows], f"has a key of more than {LONGEST_KEY} bytes")
    node_bytes = NODE_BYTES + key_bytes + np.where(long, 8, value_bytes)
    _refuse_unfilled(offsets, node_bytes + node_bytes % 2, rows, upper, page_bytes, numbers)

    key_starts = rows * page_bytes + offsets + NODE_BYTES
    content = pages.reshape(-1)
    targets = np.full(len(rows), -1, dtype=np.int64)
    if kind == BRANCH:
        targets = low | (high << 16) | (flags << 32)
    elif long.any():
        places = (key_starts + key_bytes)[long]
        numbers_of_pages = content[places[:, None] + np.arange(8)].view("<u8")[:, 0]
        targets[long] = np.minimum(numbers_of_pages, np.uint64(NO_PAGE)).astype(np.int64)
    return Nodes(content, rows, key_starts, key_bytes, value_bytes, long, targets)


def _read_snapshot(descriptor: int, position: int, number: int) -> LmdbSnapshot:
    """Return the snapshot of the meta page at a position of the file. Raises DamagedDatabaseError if it is none."""
    content = os.pread(descriptor, META_LAYOUT.size, position)
    if len(content) < META_LAYOUT.size:
        raise DamagedDatabaseError("not an LMDB: the file ends in its meta pages")
    page, _, flags, _, _, magic, version, _, _, *rest = META_LAYOUT.unpack(content)
    page_bytes, free_flags, free_depth, _, _, _, free_entries, free_root = rest[:8]
    _, main_flags, main_depth, _, _, _, main_entries, main_root, last_page, transaction = rest[8:]
    if (page, flags, magic) != (number, META, MAGIC):
        raise DamagedDatabaseError(f"not an LMDB: page {number} is no meta page")
    if version != VERSION:
        raise DamagedDatabaseError(f"not an LMDB of version {VERSION}: page {number} has version {version}")
    if not 512 <= page_bytes <= 32_768 or page_bytes & (page_bytes - 1):
        raise DamagedDatabaseError(f"page {number} gives {page_bytes} bytes as the size of pages")
    free = LmdbTree(free_flags, free_depth, free_entries, free_root)
    main = LmdbTree(main_flags, main_depth, main_entries, main_root)
    return LmdbSnapshot(transaction, page_bytes, last_page, free, main)


def _refuse_unfilled(
    offsets: np.ndarray, sizes: np.ndarray, rows: np.ndarray, upper: np.ndarray, page_bytes: int, numbers: np.ndarray
) -> None:
    """Raise DamagedDatabaseError unless the nodes of each page fill it from `upper` to its end, one after another."""
    order = np.lexsort((offsets, rows))
    ends = (offsets + sizes)[order]
    last = np.append(rows[1:] != rows[:-1], True)
    first = np.insert(last[:-1], 0, True)
    expected = np.where(last, page_bytes, np.append(offsets[order][1:], 0))
    wrong = (ends != expected) | (first & (offsets[order] != upper[rows]))
    _refuse_pages(wrong, numbers[rows], "has nodes that overlap or leave gaps")


def _refuse_pages(wrong: np.ndarray, numbers: np.ndarray, problem: str) -> None:
    """Raise DamagedDatabaseError with the number of the first page that is wrong, if there is one."""
    if wrong.any():
        raise DamagedDatabaseError(f"page {numbers[np.argmax(wrong)]} {problem}")
