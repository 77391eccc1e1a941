"""Check what readers of a cache see while others write, remove or replace it, and what a full disk leaves."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import lmdb
import pytest
import torch

from helpers.stores import fill_store, view_description
from helpers.tables import random_table
from iisan_fast.errors import InputError
from iisan_fast.states import database
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.store import Store

CPU = torch.device("cpu")
IDS = [f"i{number}" for number in range(40)]
ALL = torch.arange(1, 41)
REWRITES = """
import sys, torch
from pathlib import Path
from iisan_fast.states.store import Store
with Store(Path(sys.argv[1]), writable=True) as store:
    for number in range(6):
        store.write("v", [f"i{n}" for n in range(40)], [b"d" * 16] * 40, torch.full((40, 2, 600), float(number)))
"""


@pytest.fixture
def table() -> torch.Tensor:
    """Return the states of forty items, which take several pages each."""
    return random_table([(2, 600)], 40).views[0][1:].float()


@pytest.fixture
def cache(tmp_path, table) -> Path:
    """Store the states in a cache."""
    with Store(tmp_path / "cache", writable=True) as store:
        store.add_views({"v": view_description(2, 600)})
        store.write("v", IDS, [b"d" * 16] * 40, table)
    return tmp_path / "cache"


def rewrite(cache: Path) -> None:
    """Store other states for all items in another process, six times, so that freed pages are used again."""
    subprocess.run([sys.executable, "-c", REWRITES, cache], check=True)


# Steady readers


@pytest.mark.slow
def test_a_mapped_table_reads_what_it_opened_while_another_process_rewrites_all(cache, table):
    with closing(load_table(cache, ["v"], IDS, CPU, "mapped")) as mapped:
        for part in (slice(0, 20), slice(0, 40)):
            (states,) = mapped.read(ALL[part])
            assert torch.equal(states.table, table[part])
            if part.stop == 20:
                rewrite(cache)
    assert load_table(cache, ["v"], IDS, CPU).views[0][1:].eq(5).all()


@pytest.mark.slow
def test_a_reader_that_cannot_lock_stops_if_the_cache_is_written_meanwhile(cache, table, monkeypatch):
    monkeypatch.setattr(database, "_lock_file_ready", lambda folder, writable: writable)
    with closing(load_table(cache, ["v"], IDS, CPU, "mapped")) as mapped:
        assert torch.equal(mapped.read(ALL)[0].table, table)
        rewrite(cache)
        with pytest.raises(InputError, match="cache: the cache was changed while it was read; run this again"):
            mapped.read(ALL)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_mapped_table_outlives_its_folder(cache, table, tmp_path, replaced):
    with closing(load_table(cache, ["v"], IDS, CPU, "mapped")) as mapped:
        shutil.rmtree(cache)
        if replaced:
            shutil.copytree(fill_store(tmp_path / "other", IDS, random_table([(2, 600)], 40), ("v",)), cache)
        assert torch.equal(mapped.read(ALL)[0].table, table)


def test_a_database_that_is_cut_short_while_it_is_read_kills_nothing(cache):
    with closing(load_table(cache, ["v"], IDS, CPU, "mapped")) as mapped:
        os.truncate(cache / "states.lmdb" / "data.mdb", 3 * mmap.PAGESIZE)
        with pytest.raises(InputError, match="the cache was changed while it was read"):
            mapped.read(ALL)


def test_a_cache_that_is_replaced_while_it_is_opened_is_refused(cache, tmp_path, monkeypatch):
    other = fill_store(tmp_path / "other", IDS, random_table([(1, 4)], 40), ("w",))
    real_open = database._open

    def replaced(*arguments):
        env = real_open(*arguments)
        shutil.rmtree(cache)
        shutil.copytree(other, cache)
        return env

    monkeypatch.setattr(database, "_open", replaced)
    with pytest.raises(InputError, match="the cache was replaced while it was opened; run this again"):
        Store(cache)


@pytest.mark.slow
def test_pages_of_readers_that_were_killed_are_free_again(cache):
    script = (
        "import os, sys; from pathlib import Path; from iisan_fast.states.store import Store; "
        "store = Store(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, cache], check=False)
    with Store(cache, writable=True) as store:
        assert "no active readers" in store._database._env.readers()


def test_a_cache_without_its_database_says_what_to_do(cache):
    shutil.rmtree(cache / "states.lmdb")
    with pytest.raises(InputError, match="data.mdb: no such file; restore it, or extract"):
        Store(cache)


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb"])
def test_a_fifo_in_place_of_a_file_does_not_wait_for_ever(cache, name):
    (cache / "states.lmdb" / name).unlink()
    os.mkfifo(cache / "states.lmdb" / name)
    for writable in (False, True):
        with pytest.raises(InputError, match=f"{name}: expected a regular file, found a FIFO"):
            Store(cache, writable)


# A full disk


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(mmap.PAGESIZE), bytes(2 * mmap.PAGESIZE)], ids=len)
def test_a_database_that_a_full_disk_left_unfinished_is_made_again(tmp_path, table, content):
    cache = tmp_path / "cache"
    Store(cache, writable=True).close()
    file = cache / "states.lmdb" / "data.mdb"
    file.write_bytes(content)
    with pytest.raises(InputError):
        Store(cache)
    with Store(cache, writable=True) as store:
        store.add_views({"v": view_description(2, 600)})
        store.write("v", IDS, [b"d" * 16] * 40, table)
    assert torch.equal(load_table(cache, ["v"], IDS, CPU).views[0][1:], table)


def test_a_damaged_database_that_may_hold_states_is_not_made_again(cache):
    file = cache / "states.lmdb" / "data.mdb"
    file.write_bytes(bytes(2 * mmap.PAGESIZE) + file.read_bytes()[2 * mmap.PAGESIZE :])
    before = file.read_bytes()
    for writable in (False, True):
        with pytest.raises(InputError):
            Store(cache, writable)
    assert file.read_bytes() == before


def test_without_room_for_the_lock_file_a_writer_stops_and_a_reader_reads(cache, table, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (cache / "states.lmdb" / "lock.mdb").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(database.os, "posix_fallocate", full)
        with pytest.raises(InputError, match="cache: the cache cannot be used .No space left on device"):
            Store(cache, writable=True)
        assert torch.equal(load_table(cache, ["v"], IDS, CPU).views[0][1:], table)
    Store(cache, writable=True).close()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_lock_file_that_cannot_be_opened_is_left_out_by_a_reader(cache, table, monkeypatch, error):
    """As of another user's file in a folder with the sticky bit, or on a disk that is mounted to be read."""
    opened = os.open

    def refusing(path, flags, *arguments, **keywords):
        if Path(path).name == "lock.mdb" and flags & os.O_CREAT:
            raise OSError(error, os.strerror(error))
        return opened(path, flags, *arguments, **keywords)

    monkeypatch.setattr(database.os, "open", refusing)
    for placement in ("auto", "mapped"):
        with closing(load_table(cache, ["v"], IDS, CPU, placement)) as read:
            assert torch.equal(read.read(ALL)[0].table[-40:], table)


@pytest.mark.parametrize("is_owner", [True, False])
def test_a_reader_leaves_no_lock_file_beside_another_users_database(cache, table, monkeypatch, is_owner):
    """The owner could not write to it, so no extraction would go on."""
    lock = cache / "states.lmdb" / "lock.mdb"
    lock.unlink()
    monkeypatch.setattr(database, "_user", lambda: os.getuid() + (not is_owner))
    assert torch.equal(load_table(cache, ["v"], IDS, CPU).views[0][1:], table)
    assert lock.exists() == is_owner
    monkeypatch.undo()
    Store(cache, writable=True).close()


def test_the_lock_file_has_its_space_before_it_is_mapped(cache):
    lock = cache / "states.lmdb" / "lock.mdb"
    lock.unlink()
    lock.touch()
    os.truncate(lock, database.LOCK_BYTES)  # a file without space, as a stopped process leaves it
    with Store(cache):
        assert 512 * lock.stat().st_blocks >= database.LOCK_BYTES
        assert lock.stat().st_size == database.LOCK_BYTES


def test_a_full_disk_stops_a_write_in_one_line_and_it_goes_on_with_room(cache, table):
    new_ids = [f"n{number}" for number in range(40)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(cache, writable=True) as store:
        size = (cache / "states.lmdb" / "data.mdb").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50_000, limits[1]))
        try:
            with pytest.raises(
                InputError, match=r"cache: states cannot be written \(.*\); make room, and run it again"
            ):
                store.write("v", new_ids, [b"d" * 16] * 40, table)
            with pytest.raises(InputError, match="manifest.json: cannot be written"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
                store.add_views({"w": view_description(1, 4)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(store.digests("v", [*IDS, *new_ids])) == [b"d" * 16] * 40 + [None] * 40
        store.write("v", new_ids, [b"d" * 16] * 40, table)
    assert torch.equal(load_table(cache, ["v"], [*IDS, *new_ids], CPU).views[0][1:], table.repeat(2, 1, 1))


def test_a_map_that_cannot_grow_is_one_line(cache, table):
    class NoAddressSpace:
        """An environment whose map cannot grow."""

        def __init__(self, env: lmdb.Environment) -> None:
            self.env = env

        def __getattr__(self, name: str):
            return getattr(self.env, name)

        def set_mapsize(self, size: int) -> None:
            raise lmdb.MemoryError("mdb_env_set_mapsize: Cannot allocate memory")

    many = [f"n{number}" for number in range(400)]
    with Store(cache, writable=True) as store:
        store._database._env = NoAddressSpace(store._database._env)
        for _ in range(2):
            with pytest.raises(InputError, match="cache: states cannot be written"):
                store.write("v", many, [b"d" * 16] * 400, table.repeat(10, 1, 1))
    assert torch.equal(load_table(cache, ["v"], IDS, CPU).views[0][1:], table)
