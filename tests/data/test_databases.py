"""Damaged LMDB databases are refused in one line before LMDB reads them; whole ones of every shape are opened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from helpers import damaged_databases
from iisan_fast.data import databases, open_database
from iisan_fast.errors import InputError

PAGE = damaged_databases.PAGE


def database(path: Path, entries: int = 300, rounds: int = 4, seed: int = 0) -> Path:
    """Write a database of one file with both trees, branches, long and short contents, and free pages."""
    choice = random.Random(seed)
    with lmdb.open(str(path), subdir=False, map_size=1 << 26, lock=False, sync=False) as env:
        for turn in range(rounds):
            with env.begin(write=True) as transaction:
                for number in choice.sample(range(entries), entries):
                    transaction.put(b"long%05d" % number, choice.randbytes(choice.choice([5000, 9000])))
                    transaction.put(b"short%05d%s" % (number, b"x" * (number % 400)), choice.randbytes(number % 900))
                for number in choice.sample(range(entries), entries // (2 + turn)):
                    transaction.delete(b"long%05d" % number)
    return path


def opened(path: Path, writable: bool = False, subdir: bool = False) -> None:
    open_database(path, subdir=subdir, writable=writable, lock=False, map_size=1 << 26).close()


def refusal(path: Path, writable: bool = False) -> str:
    with pytest.raises(InputError) as error:
        opened(path, writable)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("seeds", [50, pytest.param(2500, marks=[pytest.mark.long, pytest.mark.slow])])
def test_random_damage_ends_no_process_and_gives_no_wrong_value(tmp_path, seeds):
    path = database(tmp_path / "whole.lmdb", entries=60)
    script = [sys.executable, damaged_databases.__file__, path, tmp_path, "0", str(seeds)]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout)
    assert counts["refused"] + counts["read"] == seeds and counts["refused"] > seeds / 5 and counts["written"]


@pytest.mark.parametrize("seed", range(3))
def test_every_state_of_a_database_that_lmdb_wrote_is_opened(tmp_path, seed):
    """Put and delete at random, with values of all sizes, and open after each transaction."""
    choice = random.Random(seed)
    path = tmp_path / "d.lmdb"
    expected: dict[bytes, bytes] = {}
    for turn in range(12):
        options = {"subdir": False, "map_size": 1 << 26, "lock": False, "sync": False}
        with lmdb.open(str(path), **options) as env, env.begin(write=True) as transaction:
            for _ in range(choice.choice([1, 20, 400])):
                key = choice.randbytes(choice.choice([1, 2, 60, 70, 511]))[: choice.choice([2, 511])]
                expected[key] = choice.randbytes(choice.choice([0, 10, 1500, 2030, 5000, 20_000]))
                transaction.put(key, expected[key])
            if turn % 3 == 2:
                keys = list(transaction.cursor().iternext(values=False))
                for key in choice.sample(keys, len(keys) // 3):
                    transaction.delete(key)
                    del expected[key]
        for writable in (False, True):
            options = {"lock": False, "writable": writable, "subdir": False, "map_size": 1 << 26}
            with open_database(path, **options) as env, env.begin() as transaction:
                assert dict(transaction.cursor()) == expected


def changed(path: Path, place: int, content: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)
    return path


def root_of(path: Path) -> int:
    """Return the page number of the newest root, as LMDB's own meta pages give it."""
    content = path.read_bytes()
    metas = [content[:PAGE], content[PAGE : 2 * PAGE]]
    newest = max(metas, key=lambda meta: int.from_bytes(meta[144:152], "little"))
    return int.from_bytes(newest[128:136], "little")


@pytest.mark.parametrize("writable", [False, True])
def test_a_page_below_itself_is_refused(tmp_path, writable):
    path = database(tmp_path / "d.lmdb")
    root = root_of(path)
    node = int.from_bytes(path.read_bytes()[root * PAGE + 16 : root * PAGE + 18], "little")
    changed(path, root * PAGE + node, root.to_bytes(4, "little"))
    assert f"{path}: damaged LMDB: " in refusal(path, writable)


@pytest.mark.parametrize(
    ("meta_bytes", "problem"),
    [
        ({40: (0).to_bytes(4, "little")}, "0 bytes as the size of pages"),
        ({40: (3).to_bytes(4, "little")}, "3 bytes as the size of pages"),
        ({40: (2**31).to_bytes(4, "little")}, "2147483648 bytes as the size of pages"),
        ({16: b"abcd"}, "not an LMDB: page 0 is no meta page"),
        ({20: (999).to_bytes(4, "little")}, "not an LMDB of version 1: page 0 has version 999"),
    ],
)
def test_a_damaged_meta_page_is_refused(tmp_path, meta_bytes, problem):
    path = database(tmp_path / "d.lmdb", entries=5)
    for place, content in meta_bytes.items():
        changed(path, place, content)
    assert problem in refusal(path)
    assert problem in refusal(path, writable=True)


@pytest.mark.parametrize("flag", [2, 4, 8, 4 | 16, 64])  # reverse keys, duplicates, integers, fixed duplicates, reverse
def test_a_database_whose_keys_compare_otherwise_is_refused(tmp_path, flag):
    path = database(tmp_path / "d.lmdb", entries=5)
    for meta in (0, PAGE):
        changed(path, meta + 92, flag.to_bytes(2, "little"))
    assert "expected plain keys without duplicates, found the flags" in refusal(path)


@pytest.mark.parametrize("subdir", [False, True])
def test_named_databases_beside_the_entries_are_left_alone(tmp_path, subdir):
    with lmdb.open(str(tmp_path / "d"), subdir=subdir, max_dbs=2, lock=False) as env:
        for name in (None, b"one", b"two"):
            inner = env.open_db(name, dupsort=name is not None)
            with env.begin(write=True, db=inner) as transaction:
                for number in range(200):
                    transaction.put(b"%d" % number, b"content" * 50)
    with open_database(tmp_path / "d", subdir=subdir, lock=False) as env, env.begin() as transaction:
        assert transaction.get(b"17") == b"content" * 50 and len(transaction.get(b"one")) == 48


def test_contents_are_not_read(tmp_path, monkeypatch):
    """A database of 400 contents of 9 KB is opened by reading few pages, each read once."""
    path = database(tmp_path / "d.lmdb", entries=400, rounds=1)
    bytes_read = []
    for name in ("preadv", "pread"):
        read = getattr(os, name)

        def note(descriptor, what, position, read=read):
            content = read(descriptor, what, position)
            bytes_read.append(content if isinstance(content, int) else len(content))
            return content

        monkeypatch.setattr(os, name, note)
    with open_database(path, subdir=False, lock=False) as env:
        pages = env.stat()["leaf_pages"] + env.stat()["branch_pages"]
    assert sum(bytes_read) < (pages + 20) * PAGE < path.stat().st_size / 5


def test_a_reader_opens_a_database_while_it_is_written(tmp_path):
    """Another process commits without pause; each opening sees a whole snapshot."""
    path = tmp_path / "d"
    script = """
import lmdb, random, sys
env = lmdb.open(sys.argv[1], map_size=1 << 26, sync=False)
while True:
    with env.begin(write=True) as transaction:
        for number in random.sample(range(300), 40):
            transaction.put(b"%03d" % number, bytes(random.choice([10, 900, 9000])))
    print("written", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        try:
            for _ in range(15):
                with open_database(path, subdir=True, lock=True, map_size=1 << 26) as env, env.begin() as transaction:
                    assert all(value.strip(b"\0") == b"" for _, value in transaction.cursor())
        finally:
            writer.kill()
            writer.stdout.close()


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path, other = (database(tmp_path / name, entries=5) for name in ("d.lmdb", "other.lmdb"))
    check = databases.check_trees
    monkeypatch.setattr(databases, "check_trees", lambda *arguments: (check(*arguments), other.replace(path)))
    assert "has been replaced while it was opened; start again" in refusal(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "d.lmdb")
    assert "expected a" in refusal(tmp_path / "d.lmdb")
