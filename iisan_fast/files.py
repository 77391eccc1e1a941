"""Write files and folders whole or not at all, hold lock files, name the cache folder, refuse truncated databases."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from .errors import InputError

IRREGULAR = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file `path` with `content`. A reader sees the old file or the new one, also after a crash."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` at the end of the block.

    If the block raises, the temporary file is removed and `path` stays as it was.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        keep_names(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is renamed to `path` at the end of the block.

    If the block raises, the temporary folder is removed. Raises InputError if `path` exists or its parent does not.
    """
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; remove it or choose another folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: expected a new folder in one that exists; make {path.parent} first")
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
        keep_names(path.parent)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def keep_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, so that a renamed file is there after the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_irregular(path: Path) -> None:
    """Raise InputError if a path leads to a FIFO, a socket, a device, a folder, or to a link that leads to itself.

    Reading a FIFO would wait for ever, and some devices never end. A missing file is left to the reader.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path}: expected a file, found a link that leads to itself; replace it") from None
        return
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in IRREGULAR if is_kind(mode)), "something else")
        raise InputError(f"{path}: expected a regular file, found {kind}; give the file itself")


def refuse_unwritable(folder: Path) -> None:
    """Raise InputError if a folder cannot be made or written.

    The nearest of its parents that exists, or the folder itself, has to be a folder that can be written.
    """
    path = folder.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written; {existing} is no folder that can be written")


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` as the only process. The lock ends with the block, or with the process if it is killed.

    The file itself stays. Raises InputError with the message `busy` if another process holds the lock.
    """
    lock = FileLock(path, blocking=False, thread_local=False)  # any thread may end the block
    try:
        lock.acquire()
    except Timeout:
        raise InputError(busy) from None
    try:
        yield
    finally:
        lock.release()


def cache_folder() -> Path:
    """Return the user's cache folder for this project, which may not exist yet: ~/.cache/iisan-fast on Linux.

    Raises RuntimeError if the user has no home folder.
    """
    return user_cache_path("iisan-fast", appauthor=False)


def refuse_truncated(env: Any, path: Path) -> None:
    """Close an open LMDB environment and raise InputError if its file is shorter than its header says.

    path: the database's file, or the folder that holds it as data.mdb. Reading a page beyond the end of the file would
    kill the process without a message.
    """
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    file = path / "data.mdb" if path.is_dir() else path
    actual = file.stat().st_size
    if actual < expected:
        env.close()
        raise InputError(f"{path}: truncated LMDB: expected {expected} bytes, found {actual}; copy or make it again")


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
