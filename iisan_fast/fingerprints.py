"""Digests that say which weights and which preprocessing made a state, and how two such descriptions differ.

Hashing gigabytes of weights again at every start would be a nuisance, so a file's digest is remembered under its path,
size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from .files import cache_folder, write_atomically

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")  # the first that matches is what transformers loads
NOT_COMPARED = ("encoder", "versions")  # the folder of the weights and the libraries' versions may change
LONGEST_VALUE = 60  # characters of a value in a message


def weights_digest(folder: Path) -> str:
    """sha256 over config.json and the weight files of an encoder's folder; their names count, the folder's does not."""
    weights = next((files for pattern in WEIGHT_PATTERNS if (files := sorted(folder.glob(pattern)))), [])
    digests = {path.name: file_digest(path) for path in [folder / "config.json", *weights]}
    return value_digest(digests)


def value_digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content, remembered for as long as its size and modification time stay."""
    path = path.resolve()
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    match _recall().get(str(path)):
        case [size, time, str(digest)] if [size, time] == stamp:
            return digest
    digest = _hash(path)
    _remember(str(path), [*stamp, digest])
    return digest


def changed_settings(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return one phrase for each setting whose value in `current` is not the recorded one."""
    return [
        f"{key} {_short(recorded.get(key))} there, {_short(current.get(key))} now"
        for key in sorted({*recorded, *current} - set(NOT_COMPARED))
        if recorded.get(key) != current.get(key)
    ]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _memory() -> Path:
    return cache_folder() / "digests.json"


def _recall() -> dict[str, Any]:
    try:
        known = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a memory that is absent or damaged only costs hashing again
    return known if isinstance(known, dict) else {}


def _remember(path: str, entry: list[Any]) -> None:
    memory = _memory()
    with contextlib.suppress(OSError):  # nor is a place that cannot be written worth more than that
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**_recall(), path: entry}).encode())


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
