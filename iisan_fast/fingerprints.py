"""Compute digests of weights and settings, and list the differences between two descriptions of stored states.

Hashing gigabytes of weights takes long. So the digest of a file is saved in the user's cache folder, under the file's
path, size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from .files import cache_folder, write_atomically

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")  # transformers loads the files of the first pattern that matches
NOT_COMPARED = ("encoder", "versions")  # moved weights or newer libraries do not make states out of date
LONGEST_VALUE = 60  # characters of a value in a message


def weights_digest(folder: Path, with_code: bool = False) -> str:
    """Return the sha256 (hex) of an encoder's config.json and weight files.

    with_code: also of the Python files in the folder, which run if the user trusts them. The names of the files count,
    the path of the folder does not. Raises OSError if config.json is missing.
    """
    weights = next((files for pattern in WEIGHT_PATTERNS if (files := sorted(folder.glob(pattern)))), [])
    code = sorted(folder.rglob("*.py")) if with_code else []
    files = [folder / "config.json", *weights, *code]
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    return value_digest(digests)


def value_digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's content.

    The digest is saved, and read back for as long as the file's size and modification time do not change. Raises
    OSError if the file cannot be read.
    """
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
    """Return the saved entries [size, modification time, digest] by path; empty if the file is missing or damaged."""
    try:
        known = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # without the saved digests the files are only hashed again
    return known if isinstance(known, dict) else {}


def _remember(path: str, entry: list[Any]) -> None:
    """Save an entry [size, modification time, digest] under a path, if the cache folder can be written."""
    memory = _memory()
    with contextlib.suppress(OSError):  # if the digest cannot be saved, the file is hashed again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**_recall(), path: entry}).encode())


def _hash(path: Path) -> str:
    """Return the SHA-256 digest of a file's content as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
