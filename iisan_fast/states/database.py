"""Open the LMDB database of a store, so that readers have one steady state of it and writers leave no half-made file.

A reader holds one read transaction for as long as it is open. LMDB keeps the pages of that transaction while writers
add others, so all that is read belongs together. The open files outlive the folder if that is removed or replaced.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import lmdb

from ..data import open_database
from ..errors import InputError, with_remedy
from ..files import refuse_irregular
from .memory_advice import read_ahead

MAP_BYTES = 1 << 20  # to begin with; a writer doubles it when it is full
LOCK_BYTES = 8192  # of LMDB's lock file with its table of 126 readers


class Database:
    """The database in a folder, which a reader sees as it was when it was opened."""

    def __init__(self, folder: Path, cache: Path, writable: bool) -> None:
        """Open the database. A writable one is made if it does not exist.

        folder: of LMDB's files. cache: for messages. Raises InputError if it cannot be opened or is damaged.
        """
        self.cache = cache
        self._file = folder / "data.mdb"
        self._opened = ExitStack()
        self._snapshot: lmdb.Transaction | None = None
        try:
            with self._clear_errors():
                if os.path.lexists(folder) and not folder.is_dir():
                    raise InputError(f"{folder}: expected a folder; restore it, or choose another cache")
                for file in (self._file, folder / "lock.mdb"):
                    refuse_irregular(file)
                self._locked = _lock_file_ready(folder, writable)
                if writable:
                    _remove_unfinished(self._file)
                elif not self._file.exists():
                    raise InputError(f"{self._file}: no such file; restore it, or extract into a new cache")
                else:
                    self._content = self._opened.enter_context(self._file.open("rb"))
                self._env = self._opened.enter_context(_open(folder, writable, self._locked))
                self._env.reader_check()  # frees the pages that killed readers held
                if not writable:
                    self._snapshot = self._opened.enter_context(self._begin())
                    self._bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        except BaseException:
            self._opened.close()
            raise

    def close(self) -> None:
        """Close the database. A reader gives up its state of it."""
        self._opened.close()

    @property
    def is_in_place(self) -> bool:
        """Return False if a reader's path leads to another file than the one that is open, or to none."""
        if self._snapshot is None:
            return True
        return self._file.exists() and os.path.samestat(self._file.stat(), os.fstat(self._content.fileno()))

    @property
    def size(self) -> int:
        """Return the bytes of the database that a reader has opened."""
        return self._bytes

    @property
    def entry_count(self) -> int:
        """Return the number of entries."""
        return self._env.stat()["entries"]

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """Yield a transaction for reading: the reader's steady one, or the newest state for a writer.

        Raises InputError if LMDB cannot read, or if the file was changed in a way that the reader's state did not
        survive: cut short, overwritten by a copy, or written while this process could not lock it.
        """
        with self._clear_errors():
            if self._snapshot is None:
                with self._begin() as transaction:
                    yield transaction
                return
            if os.fstat(self._content.fileno()).st_size < self._bytes:  # reading beyond the end kills the process
                raise self._changed()
            yield self._snapshot
            newest = self._env.info()["last_txnid"]
            if newest < self._snapshot.id() or (newest > self._snapshot.id() and not self._locked):
                raise self._changed()

    def read_ahead(self) -> AbstractContextManager[None]:
        """Return a context in which a reader's file is read ahead, for reading many entries about in their order."""
        return nullcontext() if self._snapshot is None else read_ahead(self._content.fileno())

    def entries(self) -> Iterator[tuple[bytes, memoryview]]:
        """Yield the key and the value of each entry, in the order of the keys. A value is valid until the next one.

        Raises InputError as `reading` does.
        """
        with self.reading() as transaction:
            for key, value in transaction.cursor():
                yield bytes(key), value

    def put(self, entries: list[tuple[bytes, bytes]]) -> None:
        """Store entries in one transaction: all of them or none. The database grows if it is full.

        Raises InputError if LMDB cannot write, as on a full disk; what was stored before stays.
        """
        try:
            while not self._put(entries):
                self._grow()
        except lmdb.Error as error:
            raise InputError(
                f"{self.cache}: states cannot be written ({error}); make room, and run it again: what is stored stays"
            ) from None

    def _put(self, entries: list[tuple[bytes, bytes]]) -> bool:
        """Store entries in one transaction. Return False, with nothing stored, if the map is full."""
        try:
            with self._env.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            return True
        except lmdb.MapFullError:
            return False

    def _grow(self) -> None:
        """Double the map. Raises lmdb.Error if there is no address space for it; then the database is closed."""
        try:
            self._env.set_mapsize(2 * self._env.info()["map_size"])
        except lmdb.Error:
            self.close()  # LMDB has given up the old map, and would read through a null pointer
            raise

    def _begin(self) -> lmdb.Transaction:
        """Return a transaction for reading, with the newest size of the database."""
        try:
            return self._env.begin(buffers=True)
        except lmdb.MapResizedError:  # another process has made the database larger
            self._env.set_mapsize(0)
            return self._env.begin(buffers=True)

    def _changed(self) -> InputError:
        """Return the error for a file that no longer holds what was opened."""
        return InputError(
            f"{self.cache}: the cache was changed while it was read; run this again when nothing writes to it"
        )

    def unusable(self, error: lmdb.Error) -> InputError:
        """Return the error for a database that LMDB cannot use."""
        remedy = "check the room on its disk, and the limit of open files (ulimit -n)"
        return InputError(f"{self.cache}: the cache cannot be used ({error}); {remedy}")

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turn errors of LMDB and of the system inside the context into InputError."""
        try:
            yield
        except lmdb.Error as error:
            raise self.unusable(error) from None
        except OSError as error:
            message = f"{self.cache}: the cache cannot be used ({error.strerror})"
            raise InputError(with_remedy(message, error.errno)) from None


def _open(folder: Path, writable: bool, locked: bool) -> lmdb.Environment:
    """Open LMDB's files. locked: make this process known to writers, which then keep the pages that it reads."""
    return open_database(
        folder, subdir=True, writable=writable, lock=locked, readahead=False, meminit=False, map_size=MAP_BYTES
    )


def _lock_file_ready(folder: Path, writable: bool) -> bool:
    """Take the disk space of LMDB's lock file, and return True; False if a reader cannot write it.

    LMDB maps the file, and writing to a mapped page that gets no space on a full disk ends the process (SIGBUS). Raises
    OSError if a writer gets no space.
    """
    file = folder / "lock.mdb"
    try:
        if writable:
            folder.mkdir(exist_ok=True)
        if not _can_be_locked(folder, file, writable):
            return writable  # LMDB tells the writer why
        if not file.exists() or _held_bytes(file) < LOCK_BYTES:
            _take_space(file, LOCK_BYTES)
    except OSError:
        if writable:
            raise
        return False
    return True


def _can_be_locked(folder: Path, file: Path, writable: bool) -> bool:
    """Return True if this process may open LMDB's lock file, which is made if there is none.

    A reader makes none beside another user's database, because that user could not write to it. The file is opened as
    LMDB opens it: in a folder with the sticky bit the system may refuse another user's file that may be written.
    """
    content = folder / "data.mdb"
    if not writable and not file.exists() and content.exists() and content.stat().st_uid != _user():
        return False
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    return True


def _user() -> int:
    """Return the number of the user who runs this process; 0 on systems without such numbers, as of their files."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _held_bytes(file: Path) -> int:
    """Return the bytes of a file that have a place on the disk."""
    status = file.stat()
    return min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))


def _take_space(file: Path, size: int) -> None:
    """Make a file at least `size` bytes long, with all of it on the disk; what it holds stays. Raises OSError."""
    with file.open("ab") as content:
        if sys.platform == "linux":
            os.posix_fallocate(content.fileno(), 0, size)
        else:
            content.write(bytes(max(0, size - content.tell())))


def _remove_unfinished(file: Path) -> None:
    """Remove a database that a full disk, a kill or a power failure left without valid first pages.

    It holds nothing: the first states come after these two pages.
    """
    if not file.exists() or file.stat().st_size > 2 * mmap.PAGESIZE:
        return
    try:
        if file.stat().st_size:  # LMDB would write to an empty file, also if it is opened for reading
            lmdb.open(str(file.parent), readonly=True, lock=False).close()
    except lmdb.InvalidError:
        file.unlink()
