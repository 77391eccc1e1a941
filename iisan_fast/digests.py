"""Digests that say which weights and which preprocessing made a state, wherever their files lie.

Hashing gigabytes of weights again at every start would be a nuisance, so a file's digest is remembered under its path,
size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .files import write_atomically

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")  # the first that matches is what transformers loads


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
    known = _read_known()
    if str(path) in known and known[str(path)][:2] == stamp:
        return known[str(path)][2]
    with path.open("rb") as file:
        digest = _hash(file)
    store = _store()
    store.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(store, json.dumps({**_read_known(), str(path): [*stamp, digest]}).encode())
    return digest


def _store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "iisan-fast" / "digests.json"


def _read_known() -> dict[str, list]:
    try:
        known = json.loads(_store().read_text())
    except (FileNotFoundError, ValueError):
        return {}  # a damaged memory only costs hashing again
    return known if isinstance(known, dict) else {}


def _hash(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
