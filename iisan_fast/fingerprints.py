"""Compute digests of weights and settings, and list the differences between two descriptions of stored states.

Hashing gigabytes of weights takes long. So the digest of a file is saved in the user's cache folder, with everything
that the system notes of the file when its content or its place changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import absolute_path, cache_folder, refuse_irregular, write_atomically
from .settings_files import read_settings

SAFE, BIN = "*.safetensors", "*.bin"  # the two kinds of weight files
LOADED_FIRST = ("model.safetensors", "model.*.safetensors", "model*.safetensors.index.json")  # then no BIN is loaded
BIN_OF_VARIANT = "*.*.bin"  # loaded before "model.safetensors" if the option `variant` asks for it
SAFE_INDEX, BIN_INDEX = "*.safetensors.index.json", "*.bin.index.json"  # which files hold which weights
MOST_TRIES = 10
SETTLED = 2_000_000_000  # nanoseconds after which a further change gets another time on every file system
# Moved weights and files, other commits with the same weights, newer libraries, and rows of other items do not make
# states out of date.
NOT_COMPARED = ("encoder", "revision", "commit", "versions", "path", "shape")
LONGEST_VALUE = 60  # characters of a value in a message


def weights_digest(folder: Path, with_code: bool = False) -> str:
    """Return the sha256 (hex) of an encoder's config.json and weight files.

    with_code: also of the Python files in the folder, which run if the user trusts them. The names of the files count,
    the path of the folder does not. Raises OSError if config.json is missing, and InputError if an index of weights is
    no JSON, or if something else stands where a file is expected.
    """
    code = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")) if with_code else []
    digests = {name: file_digest(folder / name) for name in ["config.json", *_weight_files(folder), *code]}
    return value_digest(digests)


def value_digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's content.

    The digest is saved, and read back for as long as the file is the same one and has not changed: its device, inode,
    size, and times of modification and of change. A file that has just been written is hashed again, because a further
    change may get the same time. Raises OSError if the file cannot be read, and InputError if it is no regular file,
    or is written all the time.
    """
    path = absolute_path(path)
    refuse_irregular(path)
    recalled = _recall().get(str(path))
    if recalled == _entry(path, _stamp(path.stat()), _digest_of(recalled)):
        return _digest_of(recalled)
    for _ in range(MOST_TRIES):
        began = time.time_ns()
        before = _stamp(path.stat())
        digest = _hash(path)
        if _stamp(path.stat()) == before:
            if before[-1] < began - SETTLED:
                _remember(str(path), _entry(path, before, digest))
            return digest
    raise InputError(f"{path}: is being written all the time; wait for that to end")


def changed_settings(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare two descriptions of how states were made, and return one phrase for each setting that differs.

    Each phrase gives the recorded value ("there") and the current one ("now"). The settings in NOT_COMPARED are left
    out.
    """
    return [
        f"{key} {_short(recorded.get(key))} there, {_short(current.get(key))} now"
        for key in sorted({*recorded, *current} - set(NOT_COMPARED))
        if recorded.get(key) != current.get(key)
    ]


def _short(value: object) -> str:
    """Return a value as JSON, cut to LONGEST_VALUE characters."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _memory() -> Path:
    """Return the path of the JSON file that holds the saved digests."""
    return cache_folder() / "digests.json"


def _recall() -> dict[str, Any]:
    """Return the saved entries by path; empty if the file is missing or damaged."""
    try:
        return read_settings(_memory())
    except InputError:
        return {}  # without the saved digests the files are only hashed again


def _remember(path: str, entry: dict[str, Any]) -> None:
    """Save an entry under a path, if the cache folder can be written."""
    memory = _memory()
    with contextlib.suppress(OSError):  # if the digest cannot be saved, the file is hashed again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**_recall(), path: entry}).encode())


def _entry(path: Path, stamp: list[int], digest: str) -> dict[str, Any]:
    """Return what is saved of a file. The check tells an entry that was damaged, or that older versions wrote."""
    check = value_digest([str(path), stamp, digest])[:16]
    return {"stamp": stamp, "digest": digest, "check": check}


def _digest_of(entry: Any) -> str:
    """Return the digest in a saved entry; empty if there is none."""
    digest = entry.get("digest") if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) else ""


def _stamp(status: os.stat_result) -> list[int]:
    """Return what changes with a file's content or place: device, inode, size, times of modification and of change.

    A program can set the time of modification back, but not the time of change.
    """
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files that transformers may load, also of shards in folders of their own.

    Raises InputError if an index of shards is no JSON object.
    """
    is_safe = any(next(folder.glob(pattern), None) for pattern in LOADED_FIRST)
    patterns = (SAFE, BIN_OF_VARIANT) if is_safe else (SAFE, BIN)
    names = {path.name for pattern in patterns for path in folder.glob(pattern)}
    for index in folder.glob(SAFE_INDEX if is_safe else BIN_INDEX):
        shards = read_settings(index).get("weight_map")
        if isinstance(shards, dict):
            names |= {str(shard) for shard in shards.values() if (folder / str(shard)).exists()}
    return sorted(names)


def _hash(path: Path) -> str:
    """Return the SHA-256 digest of a file's content as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
