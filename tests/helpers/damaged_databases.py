"""Damage an LMDB at random and use it: a process of its own, since what is tested for would end it.

    python damaged_databases.py DATABASE FOLDER FIRST_SEED SEEDS

Prints one JSON line: how many damaged copies were refused, read and written. Fails if a wrong value is read.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import lmdb

from iisan_fast.data import open_database
from iisan_fast.errors import InputError

PAGE = 4096


def structure(content: bytes) -> list[int]:
    """Return the numbers of the meta, branch and leaf pages, also of those that are in use no more."""
    return [
        number
        for number in range(len(content) // PAGE)
        if content[number * PAGE : number * PAGE + 8] == number.to_bytes(8, "little")
        and content[number * PAGE + 10 : number * PAGE + 12] in (b"\1\0", b"\2\0", b"\x08\0")
    ]


def damage(content: bytes, pages: list[int], choice: random.Random) -> bytes:
    """Return a file with one kind of damage in its meta, branch and leaf pages, or cut."""
    changed = bytearray(content)
    start = choice.choice(pages) * PAGE
    kind = choice.choice(["bit", "bit", "byte", "header", "word", "node", "zeros", "noise", "copy", "cut"])
    match kind:
        case "bit":
            changed[start + choice.randrange(PAGE)] ^= 1 << choice.randrange(8)
        case "byte":
            changed[start + choice.randrange(PAGE)] = choice.randrange(256)
        case "header":
            changed[start + choice.randrange(24)] = choice.randrange(256)
        case "word":
            place = start + choice.randrange(0, 160, 2)
            changed[place : place + 2] = choice.choice([0, 1, 16, 4094, 65535, choice.randrange(65536)]).to_bytes(
                2, "little"
            )
        case "node":
            low = int.from_bytes(content[start + 12 : start + 14], "little")
            slots = max(1, min(2000, low - 16) // 2)
            slot = start + 16 + 2 * choice.randrange(slots)
            node = start + int.from_bytes(content[slot : slot + 2], "little") % (PAGE - 64)
            changed[node + choice.randrange(48)] ^= 1 << choice.randrange(8)
        case "zeros":
            changed[start : start + PAGE] = bytes(PAGE)
        case "noise":
            changed[start : start + PAGE] = choice.randbytes(PAGE)
        case "copy":
            other = choice.choice(pages) * PAGE
            changed[start : start + PAGE] = content[other : other + PAGE]
        case "cut":
            del changed[choice.randrange(len(changed)) :]
    return bytes(changed)


def read(path: Path, values: dict[bytes, bytes], counts: Counter[str]) -> None:
    """Read all entries of a damaged database. Values are cut or right; damaged keys have none."""
    try:
        env = open_database(path, subdir=False, lock=False)
    except (InputError, lmdb.Error) as error:
        assert len(str(error).splitlines()) == 1, error
        counts["refused"] += 1
        return
    with env, env.begin() as transaction:
        for key, value in values.items():
            found = transaction.get(key)
            if found is not None and key.startswith(b"long"):
                assert found[: len(value)] == value[: len(found)], key
        assert sum(len(key) + len(value) >= 0 for key, value in transaction.cursor()) == env.stat()["entries"]
    counts["read"] += 1


def write(path: Path, values: dict[bytes, bytes], choice: random.Random, counts: Counter[str]) -> None:
    """Replace, remove and add entries of a damaged database, in three transactions."""
    try:
        env = open_database(path, subdir=False, writable=True, lock=False, sync=False, map_size=1 << 24)
    except (InputError, lmdb.Error):
        counts["refused to write"] += 1
        return
    with env:
        for _ in range(3):
            with env.begin(write=True) as transaction:
                for key in choice.sample(list(values), len(values) // 4):
                    transaction.delete(key)
                for key in choice.sample(list(values), len(values) // 4):
                    transaction.put(key, choice.randbytes(choice.choice([10, 900, 5000, 9000])))
    counts["written"] += 1
    open_database(path, subdir=False, lock=False).close()


def main(database: str, folder: str, first: int, seeds: int) -> None:
    """Damage, read and write copies of a database."""
    content = Path(database).read_bytes()
    pages = structure(content)
    with lmdb.open(database, subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        values = dict(transaction.cursor())
    path = Path(folder, "copy.lmdb")
    counts: Counter[str] = Counter()
    for seed in range(first, first + seeds):
        choice = random.Random(seed)
        path.write_bytes(damage(content, pages, choice))
        os.write(2, f"seed {seed}\n".encode())
        read(path, values, counts)
        write(path, values, choice, counts)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
