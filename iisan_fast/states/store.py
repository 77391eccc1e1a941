"""Store hidden states on disk, in an LMDB database that extraction fills and that the feature table is loaded from.

A store is a folder. Its `states.lmdb` has an entry for each item and view: a digest of the item's content, then the
states of the selected layers. Its `manifest.json` describes how each view was made. A store never mixes the states of
different encoders or settings.
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

from ..data import open_database
from ..encoders import grouped_layers
from ..errors import InputError, first_few
from ..files import locked, write_atomically
from ..fingerprints import changed_settings
from ..settings_files import format_number, read_settings

FORMAT_VERSION = 1
DIGEST_BYTES = 16
MAX_KEY_BYTES = 511  # LMDB's limit


class Store:
    """A folder of hidden states. Use it as a context manager, or call `close`."""

    def __init__(self, path: Path, writable: bool = False) -> None:
        """Open a store. A writable one is created if it does not exist, and locked against other writers.

        Raises InputError if the path is no store or cannot be read, or if another process writes to it.
        """
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
            self._write_manifest()  # before the database, so that a kill in between leaves an empty store
        self.manifest = _read_manifest(path)
        with self._clear_errors():
            self._env = open_database(
                database,
                subdir=True,
                writable=writable,
                lock=writable or os.access(path, os.W_OK),
                readahead=False,
                meminit=False,
                map_size=1 << 20,
            )

    def __enter__(self) -> Store:
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Close the database and release the lock."""
        self._env.close()
        self._lock.close()

    @property
    def views(self) -> dict[str, dict[str, Any]]:
        """Return the description of each view by its name, in the order in which the views were added."""
        return self.manifest["views"]

    def view(self, name: str) -> dict[str, Any]:
        """Return the description of a view. Raises InputError if the store has no view of this name."""
        if name not in self.views:
            raise InputError(f"{self.path}: no view {name!r}; it has {', '.join(self.views) or 'none'}")
        return self.views[name]

    def check_views(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Raise InputError, with the differences, if a stored view was made with other encoders or settings.

        descriptions: of the views to add, by name. Views that the store does not have yet are not checked.
        """
        for name, description in descriptions.items():
            if different := changed_settings(self.views.get(name, description), description):
                raise InputError(
                    f"{self.path}: view {name!r} was made with other settings: {'; '.join(different)}; "
                    f"restore the old settings or choose another cache"
                )

    def add_views(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Add the descriptions of new views to the manifest. Raises InputError as `check_views` does."""
        self.check_views(descriptions)
        for name, description in descriptions.items():
            self.views.setdefault(name, description)
        self._write_manifest()

    def digests(self, view: str, item_ids: Iterable[str]) -> Iterable[bytes | None]:
        """Yield the content digest stored with each item's states, in order; None if the item has no states."""
        with self._clear_errors(), self._reading() as transaction:
            for item_id in item_ids:
                value = transaction.get(_key(view, item_id))
                yield None if value is None else bytes(value[:DIGEST_BYTES])

    def contents(self, view: str, item_ids: Iterable[str]) -> str:
        """Return one digest (hex) of the contents that the items' states were made from, in the order of `item_ids`."""
        return sha256(b"".join(digest or b"" for digest in self.digests(view, item_ids))).hexdigest()

    def write(self, view: str, item_ids: list[str], digests: list[bytes], states: Tensor) -> None:
        """Store states [N, K, D] of N items, in the view's dtype, in one transaction: all of them or none.

        digests: of the items' contents, from `content_digest`.
        """
        self.write_views(item_ids, digests, {view: states})

    def write_views(self, item_ids: list[str], digests: list[bytes], states_by_view: dict[str, Tensor]) -> None:
        """Store the states [N, K, D] of several views of the same N items and contents, all in one transaction.

        The states have the dtype of the view; the digests, one an item, come from `content_digest`. The database grows
        if it is full. Raises InputError if LMDB cannot write.
        """
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
        """Copy the items' states into the tensor `into` [N, K, D], which has the view's dtype.

        positions: of the layers to read, among the view's stored layers; None for all. Raises InputError if states of
        an item are missing or have another size.
        """
        description = self.view(view)
        target = _as_bytes_array(into)
        shape = len(description["layers"]), description["width"]
        for row, value in self._values(view, item_ids):
            states = np.frombuffer(value, dtype=target.dtype, offset=DIGEST_BYTES).reshape(shape)
            target[row] = states if positions is None else states[positions]

    def check(self, view: str, item_ids: list[str]) -> None:
        """Raise InputError if any item's states are missing or have another size. States are not read."""
        for _ in self._values(view, item_ids):
            pass

    def _values(self, view: str, item_ids: list[str]) -> Iterator[tuple[int, memoryview]]:
        """Yield each item's row and its stored value, a digest followed by states.

        Raises InputError if the store lacks an item.
        """
        description = self.view(view)
        missing = []
        size = entry_bytes(description) - DIGEST_BYTES
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
        """Return a transaction for reading, with the newest size of the database."""
        try:
            return self._env.begin(buffers=True)
        except lmdb.MapResizedError:  # another process has made the database larger
            self._env.set_mapsize(0)
            return self._env.begin(buffers=True)

    def _write_manifest(self) -> None:
        """Write manifest.json as a whole or not at all."""
        write_atomically(self.path / "manifest.json", json.dumps(self.manifest, indent=2).encode())

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turn LMDB's errors inside the context into InputError."""
        try:
            yield
        except lmdb.MapFullError:
            raise
        except lmdb.Error as error:
            raise InputError(f"{self.path}: the cache cannot be used ({error})") from None


def content_digest(content: bytes) -> bytes:
    """Return the digest of an item's content that a store keeps with its states: BLAKE2b, 16 bytes."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def entry_bytes(description: dict[str, Any]) -> int:
    """Return the bytes of one item's entry in a store, a digest and states. description: of the view."""
    states = len(description["layers"]) * description["width"] * getattr(torch, description["dtype"]).itemsize
    return DIGEST_BYTES + states


def group_positions(name: str, view: dict[str, Any], layer_groups: int | None) -> list[int] | None:
    """Return the positions of the embedding output and of each group's last block among a view's stored layers.

    name: the view's name. view: its description. layer_groups: the number of groups; None returns None, for all layers.
    Raises InputError if the view lacks one of these layers.
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
    """Return True if a JSON value is an object with all the keys that reading a view needs."""
    return isinstance(value, dict) and value.keys() >= {"source", "layers", "depth", "width", "dtype"}


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a store. Raises InputError if it is missing or not one."""
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
    """Return the key of an item's entry. A long key is replaced by its hash, because LMDB limits the length."""
    key = f"{view}\0{item_id}".encode()
    return key if len(key) <= MAX_KEY_BYTES else f"{view}\0\0".encode() + sha256(key).digest()


def _as_bytes_array(states: Tensor) -> np.ndarray:
    """Return the tensor's values as integers of the same width, because numpy has no bfloat16."""
    integer = {2: torch.int16, 4: torch.int32}[states.element_size()]
    return states.contiguous().cpu().view(integer).numpy()
