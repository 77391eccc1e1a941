"""Open LMDB databases whose files may be damaged: LMDB believes its pages, and a wrong one can end the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from ..errors import InputError
from ..files import refuse_irregular
from .lmdb_pages import DamagedDatabaseError, LmdbSnapshot, check_snapshot, read_snapshots
from .lmdb_trees import check_trees

MOST_TRIES = 20  # to check a snapshot while another process writes
REMEDY = "copy it again from where it came, or make it again"


def open_database(path: Path, subdir: bool, writable: bool = False, **options: Any) -> lmdb.Environment:
    """Open an LMDB database after the structure of its file has been checked.

    path: the file, or with `subdir` the folder that holds it as data.mdb. options: of `lmdb.open`. A writable database
    may be new. Contents on overflow pages are not read.

    Raises InputError if the file is damaged, truncated or no database, and lmdb.Error if LMDB cannot open it.
    """
    file = path / "data.mdb" if subdir else path
    refuse_irregular(file)
    if writable and (not file.exists() or not file.stat().st_size):
        return lmdb.open(str(path), subdir=subdir, **options)
    with _opened(path, file) as descriptor, _damage(path):
        check_snapshot(read_snapshots(descriptor)[0], os.fstat(descriptor).st_size)  # before LMDB reads the meta pages
        env = lmdb.open(str(path), subdir=subdir, readonly=not writable, **options)
        try:
            _check(env, descriptor, path, file, writable)
        except BaseException:
            env.close()
            raise
    return env


def _check(env: lmdb.Environment, descriptor: int, path: Path, file: Path, writable: bool) -> None:
    """Check the snapshot that a transaction of an open database reads.

    While the transaction is open, other processes do not write over the snapshot, unless the database is opened without
    a lock. Then the check is repeated if it finds damage in a snapshot that is no longer the newest. Raises
    DamagedDatabaseError, or InputError if the file is replaced or written all the time.
    """
    for _ in range(MOST_TRIES):
        try:
            transaction = env.begin()
        except lmdb.MapResizedError:  # another process has made the database larger
            env.set_mapsize(0)
            continue
        with transaction:
            snapshots = read_snapshots(descriptor)
            snapshot = next((state for state in snapshots if state.transaction == transaction.id()), None)
            if snapshot is None:
                continue
            try:
                _check_whole(snapshot, descriptor, writable)
            except DamagedDatabaseError:
                if read_snapshots(descriptor)[0] == snapshot:
                    raise
                continue
            if not os.path.samestat(os.fstat(descriptor), file.stat()):
                raise InputError(f"{path}: has been replaced while it was opened; start again")
            return
    raise InputError(f"{path}: another process is writing all the time; wait for it to end")


def _check_whole(snapshot: LmdbSnapshot, descriptor: int, writable: bool) -> None:
    """Raise DamagedDatabaseError if a snapshot of an open file, or a page in it, is damaged."""
    size = os.fstat(descriptor).st_size
    check_snapshot(snapshot, size)
    check_trees(descriptor, snapshot, size, writable)


@contextmanager
def _opened(path: Path, file: Path) -> Iterator[int]:
    """Yield a descriptor that reads the file of a database. Raises InputError if it cannot be opened."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: not an LMDB that can be opened ({error.strerror})") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn a DamagedDatabaseError inside the context into an InputError that names the database."""
    try:
        yield
    except DamagedDatabaseError as error:
        problem = str(error)
        known = problem.startswith(("truncated", "not an LMDB"))
        prefix = "" if known else "damaged LMDB: "
        raise InputError(f"{path}: {prefix}{problem}; {REMEDY}") from None
