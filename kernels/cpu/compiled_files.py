"""Keep compiled libraries in a folder that nobody else can change, and load only what is whole and our own.

The folder and all folders above it belong to this user or to root, and no other user may write to them, as ssh asks of
`authorized_keys`. A library is checked on its open file, and loaded through it: what runs is what was checked.
A library's file ends with the SHA-256 of its name and its content.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "IISAN_FAST_COMPILED"
DIGEST_BYTES = 32
MOST_BYTES = 1 << 28  # of a library; it takes less than one MB
OPEN_FILES = Path("/proc/self/fd")  # Linux: a path to each open file of this process
WORKING = re.compile(
    r"iisan-fast-[0-9a-f]{16}\.so\.[a-z0-9_]{8}"
)  # names of the folders in which libraries are compiled
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems without locks

_loaded: list[int] = []  # open files of loaded libraries: dlopen takes a second file of that number for the first one


class NoLibrary(Exception):
    """The library cannot be compiled, kept or loaded; the message says why in one line."""


class Absent(NoLibrary):
    """The folder holds no library of that name."""


class Unfit(NoLibrary):
    """The folder holds a library that is damaged, or that another user may have changed."""


class CompiledFolder:
    """A folder of compiled libraries, open for as long as this object is used in a `with` block."""

    def __init__(self, path: Path) -> None:
        """Open a folder; make it, with those above it, if it is missing.

        Raises NoLibrary if another user may change it, OSError if it cannot be opened or made.
        """
        self.path = path.resolve()
        self._handle = _trusted(self.path)

    def __enter__(self) -> CompiledFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def load(self, name: str) -> ctypes.CDLL:
        """Load a library. Raises Absent if there is none, Unfit if it may not be loaded, OSError if it cannot be."""
        path = self.path / name
        try:
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._handle)
        except FileNotFoundError:
            raise Absent(f"{path}: it is not compiled yet") from None
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else f"it cannot be opened ({error.strerror})"
            raise Unfit(f"{path}: {reason}") from None
        try:
            if reason := _unfit(os.fstat(handle)):
                raise Unfit(f"{path}: {reason}")
            with open(handle, "rb", closefd=False) as file:
                content = file.read()
            if content[-DIGEST_BYTES:] != _digest(name, content[:-DIGEST_BYTES]):
                raise Unfit(f"{path}: it is damaged: its SHA-256 is not the recorded one")
            return self._load_open(handle, content[:-DIGEST_BYTES])
        except BaseException:
            os.close(handle)
            raise

    def _load_open(self, handle: int, content: bytes) -> ctypes.CDLL:
        """Load a library from its open file, or from a copy of its content if the system names no open files."""
        if OPEN_FILES.is_dir():
            library = ctypes.CDLL(str(OPEN_FILES / str(handle)))
            _loaded.append(handle)
            return library
        with tempfile.TemporaryDirectory(dir=self.path) as folder:
            copy = Path(folder) / "copy.so"
            copy.write_bytes(content)
            library = ctypes.CDLL(str(copy))
        os.close(handle)
        return library

    def keep(self, name: str, library: Path) -> None:
        """Move a library into the folder, and wait until it is on the disk. `library` lies in a working folder."""
        content = library.read_bytes()
        whole = library.with_suffix(".whole")
        handle = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(handle, "wb") as file:
            os.fchmod(handle, 0o600)  # whatever the process's mask is
            file.write(content + _digest(name, content))
            file.flush()
            os.fsync(handle)
        os.replace(whole, name, dst_dir_fd=self._handle)
        os.fsync(self._handle)

    @contextmanager
    def working(self, name: str) -> Iterator[Path]:
        """Yield a new folder in which to compile a library, and remove it at the end of the block."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self.path))
        try:
            folder.chmod(0o700)
            yield folder
        finally:
            shutil.rmtree(folder)

    @contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Hold the folder's lock, so that one process compiles at a time, and remove what killed ones have left.

        On a file system without locks nothing is held and nothing removed. Raises NoLibrary if another process still
        holds the lock after `seconds`.
        """
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if _lock(handle, time.monotonic() + seconds, self.path):
                for left in filter(WORKING.fullmatch, os.listdir(self._handle)):
                    shutil.rmtree(self.path / left)
            yield
        finally:
            os.close(handle)


def _lock(handle: int, until: float, folder: Path) -> bool:
    """Lock an open file for this process; return False if its file system has no locks.

    Raises NoLibrary if another process still holds the lock at the time `until`.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                raise NoLibrary(f"{folder}: another process is compiling and does not end") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise


def _trusted(path: Path) -> int:
    """Return an open folder, made if it is missing. It and those above it are opened one below the other.

    Raises NoLibrary if another user may change one of them.
    """
    if not hasattr(os, "getuid"):
        raise NoLibrary("it is compiled only on systems where files have owners, such as Linux")
    searched = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    handle = os.open(path.anchor, searched)
    try:
        for place, below in zip(reversed(path.parents), path.parts[1:]):
            _refuse_others(place, os.fstat(handle), sticky=True)
            before = handle
            handle = _below(before, below, searched)
            os.close(before)
        _refuse_others(path, os.fstat(handle), sticky=False)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
    finally:
        os.close(handle)


def _below(folder: int, name: str, flags: int) -> int:
    """Return a folder in an open one, opened. It is made for this user alone if it is missing."""
    with suppress(FileNotFoundError):
        return os.open(name, flags, dir_fd=folder)
    with suppress(FileExistsError):  # another process has made it
        os.mkdir(name, 0o700, dir_fd=folder)
        os.chmod(name, 0o700, dir_fd=folder)  # whatever the process's mask is
    return os.open(name, flags, dir_fd=folder)


def _refuse_others(place: str | Path, found: os.stat_result, sticky: bool) -> None:
    """Raise NoLibrary if another user than root owns a folder or may write to it.

    sticky: others may write if only owners can remove or rename what lies there, as in /tmp.
    """
    remedy = f"set {CACHE_VARIABLE} to a folder of your own"
    if not _is_ours(found):
        raise NoLibrary(f"{place}: it belongs to user {found.st_uid}, who may write there; {remedy}")
    if _others_may_write(found) and not (sticky and found.st_mode & stat.S_ISVTX):
        raise NoLibrary(f"{place}: others may write there; {remedy}")


def _unfit(found: os.stat_result) -> str:
    """Return why an open file may not be loaded, or ""."""
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if not _is_ours(found):
        return f"it belongs to user {found.st_uid}"
    if _others_may_write(found):
        return "others may write to it"
    if found.st_nlink != 1:
        return "it has another name too, through which it may be changed"
    if not DIGEST_BYTES < found.st_size <= MOST_BYTES:
        return f"it is damaged: it has {found.st_size} bytes"
    return ""


def _is_ours(found: os.stat_result) -> bool:
    """Return True if this user or root owns a file."""
    return found.st_uid in (0, os.getuid())


def _others_may_write(found: os.stat_result) -> bool:
    """Return True if the group or everybody may write to a file."""
    return bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _digest(name: str, content: bytes) -> bytes:
    """Return the SHA-256 of a library's name and content."""
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
