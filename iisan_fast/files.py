"""Write files and folders whole or not at all, hold lock files, name the cache folder."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from .errors import InputError, system_error_number

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK))
NO_ROOM = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))
IRREGULAR = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expanded_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with ~ or ~user at its beginning replaced by the home folder, as a shell does.

    Raises InputError if there is no such user or home folder: nobody wants a folder named ~.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("~"):
        name = Path(text).parts[0]
        raise InputError(f"{path}: there is no home folder for {name}; write ./{name} for a file of this name")
    return Path(text)


def as_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Return an argument as a path, ~ replaced by the home folder.

    Raises InputError for another type, for "", for the ~ of an unknown user, and for a path that is no UTF-8 or
    holds a zero byte.
    """
    if not isinstance(path, (str, os.PathLike)) or path == "":
        raise InputError(f"{name}: expected a path, found {path!r}")
    if "\0" in str(path):
        raise InputError(f"{name}: expected a path, found {str(path)!r}, which holds a zero byte")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # bytes that are no text; safetensors and JSON take none
        raise InputError(
            f"{name}: expected a path in UTF-8, found {str(path)!r}; rename it, or make a link to it"
        ) from None
    return expanded_path(path)


def expanded_name(name: str) -> str:
    """Return a model's name: a hub name as it is, a folder with its ~ replaced. Raises as `expanded_path` does."""
    return str(expanded_path(name)) if name.startswith("~") else name


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file `path` with `content`. A reader sees the old file or the new one, also after a crash."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` at the end of the block.

    It lies in a temporary folder beside `path`, because some libraries write into temporary files of their own, beside
    the file. If the block raises, the folder is removed and `path` stays as it was. What a killed process has left of
    the same path is removed too. An OSError about a temporary file names `path`.

    Raises InputError if `path` is a folder, a device or another file that must not be replaced.
    """
    refuse_irregular(path)
    with naming(path), _temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        keep_names(path.parent)


def keep_under(path: Path, name: Path) -> None:
    """Let a second name lead to the content of the file `path`, before another file takes the first name.

    Where the file system has no hard links, the file is renamed. Raises OSError if neither is possible.
    """
    with whole_file(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            path.replace(temporary)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is renamed to `path` at the end of the block.

    If the block raises, the temporary folder is removed. What a killed process has left of the same path is removed
    too. An OSError about a temporary file names `path`. Raises InputError if `path` exists or its parent does
    not.
    """
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; remove it or choose another folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: expected a new folder in one that exists; make {path.parent} first")
    with naming(path), _temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
        keep_names(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into an error of the system that names a temporary file of it, or no file where there is no room.

    The error is an OSError, or one of a library written in Rust.
    """
    try:
        yield
    except InputError:  # which says all that its user needs
        raise
    except Exception as error:
        number = system_error_number(error)
        names = [str(name) for field in ("filename", "filename2") if (name := getattr(error, field, None)) is not None]
        if number is not None and (any(_prefix(path) in name for name in names) or not names and number in NO_ROOM):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which is removed at the end of the block. Leftovers of others go first."""
    remove_leftovers(path)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    handle = os.open(folder, os.O_RDONLY)
    try:
        _mark_as_written(handle)
        yield folder
    finally:
        os.close(handle)
        if folder.is_dir():  # unless everything was removed meanwhile
            shutil.rmtree(folder)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary folders of a path that a killed process of this user has left beside it.

    Those that a living process writes are marked by a lock, and stay. On systems without such locks, and in a folder
    that cannot be written, all stay.
    """
    if fcntl is None or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        return
    made_here = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}")  # by `tempfile`
    for name in os.listdir(path.parent):
        if made_here.fullmatch(name) and _is_left(path.parent / name):
            shutil.rmtree(path.parent / name)


def _prefix(path: Path) -> str:
    """Return the beginning of the names of a path's temporary folders."""
    return f".{path.name}.iisan-fast-"


def _mark_as_written(handle: int) -> None:
    """Lock an open temporary folder until it is closed, so that no other process takes it for a leftover."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks, where leftovers stay
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_left(path: Path) -> bool:
    """Return True if a path is a folder of this user that no living process has marked."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no folder, gone, or of another user
        return False
    try:
        if os.fstat(handle).st_uid != os.getuid():
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


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
    _refuse_loop(path)
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in IRREGULAR if is_kind(mode)), "something else")
        raise InputError(f"{path}: expected a regular file, found {kind}; give the file itself")


def absolute_path(path: Path) -> Path:
    """Return a path from the root, with its links followed. Raises InputError if one of them leads to itself."""
    _refuse_loop(path)
    return path.resolve()


def _refuse_loop(path: Path) -> None:
    """Raise InputError if a path leads to a link that leads to itself."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            message = f"{path}: expected a file or a folder, found a link that leads to itself; replace it"
            raise InputError(message) from None


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

    The file itself stays. Raises InputError with the message `busy` if another process holds the lock, and if `path`
    is no regular file: a lock behind a link would be another one by each of its names.
    """
    if path.is_symlink():
        raise InputError(f"{path}: expected a lock file, found a link; remove the link")
    refuse_irregular(path)
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


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
