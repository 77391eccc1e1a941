"""Hidden states at rest: the LMDB store that extraction fills and the feature table is read from.

A store is a folder with `states.lmdb` (one entry per item and view: a digest of the item's content, then its kept
layers) and `manifest.json` (what every view was made with). States of different encoders or settings never mix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch import Tensor

from ..encoders import grouped_layers
from ..errors import InputError, first_few
from ..files import locked, refuse_truncated, write_atomically
from ..fingerprints import changed_settings
from ..settings_files import format_number, read_settings

FORMAT_VERSION = 1
DIGEST_BYTES = 16
MAX_KEY_BYTES = 511  # LMDB's own limit


class Store:
    """A folder of hidden states. Use as a context manager."""

    def __init__(self, path: Path, writable: bool = False) -> None:
        """Opens a store; a writable one is created where there is none. Raises InputError if it is unreadable."""
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: expected a folder for the cache, found a file")
        self.path = path
        if writable:
            path.mkdir(parents=True, exist_ok=True)
        busy = f"{path}: another extraction is writing to this cache; wait for it to end"
        self._lock = ExitStack()
        if writable:
            self._lock.enter_context(locked(path / "lock", busy))
        database = path / "states.lmdb"
        if writable and not (path / "manifest.json").exists() and not database.exists():
            self.manifest: dict[str, Any] = {"format": FORMAT_VERSION, "views": {}}
            self._write_manifest()  # before the database: a kill in between leaves an empty store, not a broken one
        self.manifest = _read_manifest(path)
        with self._clear_errors():
            self._env = lmdb.open(
                str(database),
                readonly=not writable,
                lock=writable or os.access(path, os.W_OK),
                readahead=False,
                meminit=False,
                map_size=1 << 20,
            )
            refuse_truncated(self._env, database)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the database and the lock."""
        self._env.close()
        self._lock.close()

    @property
    def views(self) -> dict[str, dict[str, Any]]:
        """{view's name: what it was made with}, in the order the views were added."""
        return self.manifest["views"]

    def view(self, name: str) -> dict[str, Any]:
        """Return the description of a view. Raises InputError if there is none of that name."""
        if name not in self.views:
            raise InputError(f"{self.path}: no view {name!r}; it has {', '.join(self.views) or 'none'}")
        return self.views[name]

    def check_views(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Raises InputError where a view stands here already and was made otherwise, saying what differs."""
        for name, description in descriptions.items():
            if different := changed_settings(self.views.get(name, description), description):
                raise InputError(
                    f"{self.path}: view {name!r} was made otherwise: {'; '.join(different)}; "
                    f"restore the old settings or choose another cache"
                )

    def add_views(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Records the views that are new here, after `check_views`."""
        self.check_views(descriptions)
        for name, description in descriptions.items():
            self.views.setdefault(name, description)
        self._write_manifest()

    def digests(self, view: str, item_ids: Iterable[str]) -> Iterable[bytes | None]:
        """The content digest stored with each item's states, None where there are none."""
        with self._clear_errors(), self._reading() as transaction:
            for item_id in item_ids:
                value = transaction.get(_key(view, item_id))
                yield None if value is None else bytes(value[:DIGEST_BYTES])

    def contents(self, view: str, item_ids: Iterable[str]) -> str:
        """One digest of the contents that all the items' states were made from, in the order given."""
        return sha256(b"".join(digest or b"" for digest in self.digests(view, item_ids))).hexdigest()

    def write(self, view: str, item_ids: list[str], digests: list[bytes], states: Tensor) -> None:
        """Store states [N, K, D], already in the store's dtype, in one transaction: all of them or none."""
        self.write_views(item_ids, digests, {view: states})

    def write_views(self, item_ids: list[str], digests: list[bytes], states_by_view: dict[str, Tensor]) -> None:
        """Store several views' states of the same contents, as `write` does, all in one transaction."""
        entries = [
            (_key(view, item_id), digest + array.tobytes())
            for view, states in states_by_view.items()
            for item_id, digest, array in zip(item_ids, digests, _as_bytes_array(states))
        ]
        while True:
            try:
                with self._clear_errors(), self._env.begin(write=True) as transaction:
                    for key, value in entries:
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])

    def read(self, view: str, item_ids: list[str], into: Tensor, positions: list[int] | None = None) -> None:
        """Fill into [N, K, D], of the store's dtype, with the items' states. Raises InputError if any is missing.

        positions: among the stored layers, the layers to read; None for all.
        """
        description, target = self.view(view), _as_bytes_array(into)
        shape = len(description["layers"]), description["width"]
        for row, value in self._values(view, item_ids):
            states = np.frombuffer(value, dtype=target.dtype, offset=DIGEST_BYTES).reshape(shape)
            target[row] = states if positions is None else states[positions]

    def check(self, view: str, item_ids: list[str]) -> None:
        """Raises InputError if any item's states are missing or of another size, without reading them."""
        for _ in self._values(view, item_ids):
            pass

    def _values(self, view: str, item_ids: list[str]) -> Iterator[tuple[int, memoryview]]:
        """(row, digest and states) of each item."""
        description, missing = self.view(view), []
        size = len(description["layers"]) * description["width"] * getattr(torch, description["dtype"]).itemsize
        with self._clear_errors(), self._reading() as transaction:
            for row, item_id in enumerate(item_ids):
                value = transaction.get(_key(view, item_id))
                if value is None:
                    missing.append(item_id)
                elif len(value) != DIGEST_BYTES + size:
                    raise InputError(
                        f"{self.path}: view {view!r}, item {item_id!r}: expected {size} bytes of states, "
                        f"found {len(value) - DIGEST_BYTES}; extract into a new cache"
                    )
                else:
                    yield row, value
        if missing:
            raise InputError(
                f"{self.path}: view {view!r} lacks {len(missing)} of {len(item_ids)} items "
                f"({first_few(missing, len(missing))}); run iisan-fast extract with the same split, "
                "min_interactions and max_inputs"
            )

    def _reading(self) -> lmdb.Transaction:
        try:
            return self._env.begin(buffers=True)
        except lmdb.MapResizedError:  # another process has added to the store
            self._env.set_mapsize(0)
            return self._env.begin(buffers=True)

    def _write_manifest(self) -> None:
        write_atomically(self.path / "manifest.json", json.dumps(self.manifest, indent=2).encode())

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError:
            raise
        except lmdb.Error as error:
            raise InputError(f"{self.path}: the cache cannot be used ({error})") from None


def content_digest(content: bytes) -> bytes:
    """Return the digest of an item's content that a store keeps beside its states: BLAKE2b, 16 bytes."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def group_positions(name: str, view: dict[str, Any], layer_groups: int | None) -> list[int] | None:
    """Return the positions, among a stored view's layers, of the last block of each group; None for all layers.

    Raises InputError if the view lacks one of those blocks.
    """
    if layer_groups is None:
        return None
    stored = view["layers"]
    layers = grouped_layers(view["depth"] - 1, layer_groups, view.get("first_layer", 0))
    if lacking := [layer for layer in layers if layer not in stored]:
        raise InputError(
            f"layer_groups: {layer_groups} of the encoder's {view['depth'] - 1} blocks are layers "
            f"{', '.join(map(str, layers))}; view {name!r} of the cache has {', '.join(map(str, stored))} and lacks "
            f"{', '.join(map(str, lacking))}; extract with layer_groups {layer_groups} into another cache"
        )
    return [stored.index(layer) for layer in layers]


def describes_view(value: Any) -> bool:
    """Return True if a JSON value says all that reading a view needs."""
    return isinstance(value, dict) and value.keys() >= {"source", "layers", "depth", "width", "dtype"}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.exists():
        raise InputError(f"{path}: not a cache of hidden states (no manifest.json); run iisan-fast extract")
    manifest = read_settings(file)
    format_number(manifest, file, (FORMAT_VERSION,), "extract into a new cache")
    views = manifest.get("views")
    if not isinstance(views, dict) or not all(map(describes_view, views.values())):
        raise InputError(f"{file}: not a manifest of hidden states; extract into a new cache")
    return manifest


def _key(view: str, item_id: str) -> bytes:
    key = f"{view}\0{item_id}".encode()
    return key if len(key) <= MAX_KEY_BYTES else f"{view}\0\0".encode() + sha256(key).digest()


def _as_bytes_array(states: Tensor) -> np.ndarray:
    """The tensor's memory as integers of the same width: numpy has no bfloat16."""
    integer = {2: torch.int16, 4: torch.int32}[states.element_size()]
    return states.contiguous().cpu().view(integer).numpy()
