"""Tell the system in which order the pages of a memory-mapped file will be read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAPS = Path("/proc/self/maps")


@contextmanager
def read_ahead(descriptor: int) -> Iterator[None]:
    """Let the system read the maps of an open file ahead in this context, which reads most of it about in order.

    After it, as before, each page that is not in memory is read alone, as LMDB has it for single entries: that takes
    little memory, but a whole file many times as long. Only Linux is told.
    """
    _advise(descriptor, "MADV_NORMAL")
    try:
        yield
    finally:
        _advise(descriptor, "MADV_RANDOM")


def _advise(descriptor: int, advice: str) -> None:
    """Give an advice, a name of the module mmap, on all maps of an open file."""
    if not MAPS.exists() or not hasattr(mmap, advice):
        return
    inode = str(os.fstat(descriptor).st_ino)
    libc = ctypes.CDLL(None)
    for line in MAPS.read_text().splitlines():
        addresses, _, _, _, its_inode, *_ = line.split(maxsplit=5)
        if its_inode == inode:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))
