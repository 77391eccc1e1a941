"""Store hidden states on disk, in an LMDB database that extraction fills and that the feature table is loaded from.

A store is a folder. Its `states.lmdb` has an entry for each item and view: a digest of the item's content, the states
of the selected layers, and a checksum. Its `manifest.json` describes how each view was made. A store never mixes the
states of different encoders or settings. A store that is open for reading gives one steady state of the cache. A cache
in shards is read as one store.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checksums import CHECKSUM_BYTES, name_seed, seeded_checksum
from ..config import FEATURES
from ..encoders import grouped_layers
from ..errors import InputError, first_few
from ..files import locked
from .database import Database
from .entries import DIGEST_BYTES, RECORDED, entry_bytes, entry_key, entry_problem, fits, states_bytes, with_checksum
from .joined_shards import lacking_text, open_shards, refuse_other_shard
from .manifest import (
    FILE,
    FORMAT,
    UNCHECKED_FORMAT,
    new_manifest,
    read_manifest,
    read_shard_count,
    refuse_other_settings,
    write_manifest,
)
from .sharded_database import ShardedDatabase
from .shards import FOLDER, Shard

LOGGER = logging.getLogger(__name__)


class Store:
    """A folder of hidden states. Use it as a context manager, or call `close`."""

    def __init__(self, path: Path, writable: bool = False, shard: Shard | None = None) -> None:
        """Open a store. A writable one is created if it does not exist, and locked against other writers.

        shard: the one that a writable store is; None for a whole cache. Raises InputError if the path is no store or
        cannot be read, if another process writes to it, or if a cache in shards is to be written as one.
        """
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(f"{path}: expected a folder for the cache, found a file or a link that leads to none")
        self.path = path
        self._opened = ExitStack()
        self._database: Database | ShardedDatabase
        try:
            if writable:
                path.mkdir(parents=True, exist_ok=True)
                busy = f"{path}: another extraction is writing to this cache; wait for it to end"
                self._opened.enter_context(locked(path / "lock", busy))
                if not any((path / name).exists() for name in (FILE, "states.lmdb", FOLDER)):
                    write_manifest(path, new_manifest(shard))  # first, so that a kill in between leaves an empty store
            count = read_shard_count(path)
            if count is None:
                self._database = self._opened.enter_context(closing(Database(path / "states.lmdb", path, writable)))
                self.manifest = read_manifest(path)  # after the database: views are described before they have states
            elif writable:
                raise InputError(f"{path}: the cache is in {count} shards, and is not written as one; run this again")
            else:
                self._database, self.manifest = open_shards(path, count)
                self._opened.callback(self._database.close)
            if shard is not None:
                refuse_other_shard(path, self.manifest, shard)
            if not self._database.is_in_place:
                raise InputError(f"{path}: the cache was replaced while it was opened; run this again")
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Store:
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Close the database and release the lock."""
        self._opened.close()

    @property
    def views(self) -> dict[str, dict[str, Any]]:
        """Return the description of each view by its name, in the order in which the views were added."""
        return self.manifest["views"]

    def view(self, name: str) -> dict[str, Any]:
        """Return the description of a view. Raises InputError if the store, or one of its shards, has no such view."""
        if name not in self.views:
            raise InputError(f"{self.path}: no view {name!r}; it has {', '.join(self.views) or 'none'}")
        if shard := self.manifest.get("lacking", {}).get(name):
            raise InputError(f"{self.path}: shard {shard} lacks view {name!r}; {shard.command(self.path)} makes it")
        return self.views[name]

    def where(self, name: str) -> str:
        """Return the cache and the name of a view, for messages."""
        return f"{self.path}: view {name!r}"

    def check_views(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Raise InputError, with the differences, if a stored view was made with other encoders or settings.

        descriptions: of the views to add, by name. Views that the store does not have yet are not checked.
        """
        refuse_other_settings(self.path, self.views, descriptions)

    def add_views(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Add the descriptions of new views to the manifest. Raises InputError as `check_views` does."""
        self.check_views(descriptions)
        for name, description in descriptions.items():
            self.views.setdefault(name, description)
        write_manifest(self.path, self.manifest)

    def begin_shard(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Add the descriptions of views to a shard, which is unfinished from now on. Raises as `add_views` does."""
        self.manifest["unfinished"] = True
        self.add_views(descriptions)

    def finish_shard(self) -> None:
        """Record that all items of a shard are stored."""
        if self.manifest.pop("unfinished", False):
            write_manifest(self.path, self.manifest)

    def digests(self, view: str, item_ids: Iterable[str]) -> Iterator[bytes | None]:
        """Yield the content digest stored with each item's states, in order; None if the item has no states.

        The states are not read, so a damaged digest is given as it is.
        """
        with self._database.reading() as transaction:
            for item_id in item_ids:
                entry = transaction.get(entry_key(view, item_id))
                yield None if entry is None else bytes(entry[:DIGEST_BYTES])

    def sound_digests(self, view: str, item_ids: Iterable[str]) -> Iterator[bytes | None]:
        """Yield the content digest stored with each item's states, in order; None if the states cannot be used.

        Those are missing, or do not fit their checksum. All states are read. Entries of format 1 that lack a checksum
        can be used. A view that the store does not have yet gives None for all items.
        """
        size = entry_bytes(self.views[view]) if view in self.views else 0
        with self._database.reading() as transaction:
            for item_id in item_ids:
                key = entry_key(view, item_id)
                entry = transaction.get(key)
                sound = entry is not None and (fits(key, entry, size) or self._is_unchecked(entry, size))
                yield bytes(entry[:DIGEST_BYTES]) if sound else None

    def contents(self, view: str, item_ids: Iterable[str]) -> str:
        """Return one digest (hex) of the contents that the items' states were made from, in the order of `item_ids`."""
        with self.read_ahead():
            return sha256(b"".join(digest or b"" for digest in self.digests(view, item_ids))).hexdigest()

    def read_ahead(self) -> AbstractContextManager[None]:
        """Return a context in which a reader's files are read ahead, for reading the states of most items."""
        return self._database.read_ahead()

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
        entries = []
        for view, states in states_by_view.items():
            for item_id, digest, array in zip(item_ids, digests, _as_bytes_array(states)):
                key = entry_key(view, item_id)
                entries.append((key, with_checksum(key, digest + array.tobytes())))
        self._database.put(entries)

    def read(self, view: str, item_ids: list[str], into: Tensor, positions: list[int] | None = None) -> None:
        """Copy the items' states into the tensor `into` [N, K, D], which has the view's dtype.

        positions: of the layers to read, among the view's stored layers; None for all. Raises InputError if states of
        an item are missing, have another size or do not fit their checksum.
        """
        description = self.view(view)
        target = _as_bytes_array(into)
        shape = len(description["layers"]), description["width"]
        end = DIGEST_BYTES + states_bytes(description)
        recorded = RECORDED.unpack_from
        all_have_checksums = self.manifest["format"] != UNCHECKED_FORMAT
        for row, key, entry in self._entries(view, item_ids):
            content = entry[:end]
            states = np.frombuffer(content, target.dtype, offset=DIGEST_BYTES).reshape(shape)
            target[row] = states if positions is None else states[positions]
            # The checksum comes after the copy, which brings the bytes into the CPU's caches faster.
            has_checksum = all_have_checksums or len(entry) > end
            if has_checksum and (seeded_checksum(content, name_seed(key)),) != recorded(entry, end):
                raise self._damaged(view, item_ids[row], entry)

    def check(self, view: str, item_ids: list[str]) -> None:
        """Raise InputError if any item's states are missing or have another size. States are not compared."""
        with self.read_ahead():  # LMDB's Python module touches all pages of an entry that is looked up
            for _ in self._entries(view, item_ids):
                pass

    def _entries(self, view: str, item_ids: list[str]) -> Iterator[tuple[int, bytes, memoryview]]:
        """Yield each item's row, its key and its entry: a digest, states, and the checksum unless it lacks one.

        Raises InputError if the store lacks an item, or if an entry has another size than its view.
        """
        missing = []
        size = entry_bytes(self.view(view))
        with self._database.reading() as transaction:
            for row, item_id in enumerate(item_ids):
                key = entry_key(view, item_id)
                entry = transaction.get(key)
                if entry is None:
                    missing.append(item_id)
                elif len(entry) == size or self._is_unchecked(entry, size):
                    yield row, key, entry
                else:
                    raise self._damaged(view, item_id, entry)
        if missing:
            count = self.manifest.get("shards")
            remedy = "run iisan-fast extract" if count is None else lacking_text(self.path, missing, count)
            raise InputError(
                f"{self.path}: view {view!r} lacks {len(missing)} of {len(item_ids)} items "
                f"({first_few(missing, len(missing))}); {remedy} with the same split, "
                "min_interactions and max_inputs"
            )

    def _damaged(self, view: str, item_id: str, entry: memoryview) -> InputError:
        """Return the error for an entry that cannot be used."""
        problem = entry_problem(entry, entry_bytes(self.view(view)))
        return InputError(
            f"{self.path}: view {view!r}, item {item_id!r}: {problem}; iisan-fast extract encodes it again"
        )

    def lacks_checksum(self, entry: memoryview, size: int) -> bool:
        """Return True if an entry is one of format 1 without a checksum. size: of one of its view with a checksum."""
        return self.manifest["format"] == UNCHECKED_FORMAT and len(entry) == size - CHECKSUM_BYTES

    def _is_unchecked(self, entry: memoryview, size: int) -> bool:
        """Return `lacks_checksum`, and say once that the cache has such entries."""
        lacks = self.lacks_checksum(entry, size)
        if lacks:
            _warn_of_missing_checksums(self.path)
        return lacks

    def entries(self) -> Iterator[tuple[bytes, memoryview]]:
        """Yield the key and the value of each entry of all views. A value is valid until the next one is taken."""
        return self._database.entries()

    def add_checksums(self, keys: list[bytes]) -> None:
        """Give the entries under these keys, which lack it, a checksum, all in one transaction."""
        with self._database.reading() as transaction:
            entries = [(key, with_checksum(key, bytes(transaction.get(key)))) for key in keys]
        self._database.put(entries)

    def require_checksums(self) -> None:
        """Make the store one of the format in which every entry has a checksum."""
        self.manifest["format"] = FORMAT
        write_manifest(self.path, self.manifest)


def group_positions(name: str, view: dict[str, Any], layer_groups: int | None) -> list[int] | None:
    """Return the positions of the embedding output and of each group's last block among a view's stored layers.

    name: the view's name. view: its description. layer_groups: the number of groups; None returns None, for all layers.
    Raises InputError if the view lacks one of these layers.
    """
    if layer_groups is None:
        return None
    stored = view["layers"]
    if view.get("source") == FEATURES and not layer_groups < view["depth"] == len(stored):
        raise InputError(
            f"layer_groups: {layer_groups} groups need {layer_groups + 1} layers or more, none left out; the features "
            f"of view {name!r} have {len(stored)} of {view['depth']}; leave layer_groups out, or name layers"
        )
    layers = grouped_layers(view["depth"] - 1, layer_groups, view.get("first_layer", 0))
    if lacking := [layer for layer in layers if layer not in stored]:
        raise InputError(
            f"layer_groups: {layer_groups} of the encoder's {view['depth'] - 1} blocks are layers "
            f"{', '.join(map(str, layers))}; view {name!r} of the cache has {', '.join(map(str, stored))} and lacks "
            f"{', '.join(map(str, lacking))}; extract with layer_groups {layer_groups} into another cache"
        )
    return [stored.index(layer) for layer in layers]


def _as_bytes_array(states: Tensor) -> np.ndarray:
    """Return the tensor's values as integers of the same width, because numpy has no bfloat16."""
    integer = {2: torch.int16, 4: torch.int32}[states.element_size()]
    return states.contiguous().cpu().view(integer).numpy()


@functools.cache
def _warn_of_missing_checksums(path: Path) -> None:
    """Log, once for each cache, that damage to some of its entries would not be noticed."""
    LOGGER.warning("%s: the cache was made without checksums; iisan-fast verify %s adds them", path, path)
