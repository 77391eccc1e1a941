"""Files and folders that are either whole or absent, and databases that turn out not to be whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` with `content`: a reader, or a restart after a crash, sees the old file or the new one."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields an empty file that replaces `path` if all goes well, or vanishes."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` if all goes well, or vanishes. Raises InputError if that exists."""
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; remove it or choose another folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: expected a new folder in one that exists; make {path.parent} first")
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def locked(path: Path, busy: str) -> IO[bytes]:
    """A file held by one process alone, until it is closed or the process ends, however it ends.

    Raises InputError, saying `busy`, where another holds it.
    """
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(busy) from None
    return file


def refuse_truncated(env: Any, path: Path) -> None:
    """Closes an open LMDB environment and raises InputError where its file, or its folder's, is shorter than it says.

    Reading a page beyond the file's end would kill the process without a word.
    """
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    found = (path / "data.mdb" if path.is_dir() else path).stat().st_size
    if found < expected:
        env.close()
        raise InputError(f"{path}: truncated LMDB: expected {expected} bytes, found {found}; copy or make it again")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
