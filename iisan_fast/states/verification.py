"""Compare every entry of a cache with its checksum, and add the checksums that are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..verified import Damage, Verified
from ..workers import batched
from .entries import entry_bytes, entry_problem, fits, key_names
from .manifest import UNCHECKED_FORMAT, read_manifest, read_shard_count
from .shards import FOLDER, all_shards
from .store import Store

ADDED_AT_ONCE = 1024  # entries of one transaction


def verify_cache(path: Path, add: bool = True) -> Verified:
    """Read the whole cache `path`, and return its damaged entries, each with its view and item.

    add: give the entries that lack a checksum, in a cache of format 1, the one of what they hold now, and make the
    cache one of format 2; an extraction cannot write at the same time. Raises InputError if the folder is no cache, if
    its manifest or its database is damaged, if it lacks a shard, or if it cannot be written to add checksums.
    """
    result = Verified(path, "cache", checked=1)  # the manifest
    count = read_shard_count(path)
    if count is not None:
        _verify_shards(path, count, result)
        return result
    adds = add and read_manifest(path)["format"] == UNCHECKED_FORMAT
    with Store(path, writable=adds) as store:
        unchecked = _compare(store, result)
        if adds:
            for keys in batched(unchecked, ADDED_AT_ONCE):
                store.add_checksums(keys)
                result.added += len(keys)
            store.require_checksums()
        else:
            result.unchecked = len(unchecked)
    return result


def _verify_shards(path: Path, count: int, result: Verified) -> None:
    """Compare the entries of all shards of a cache. Raises InputError if shards are missing or do not fit together."""
    Store(path).close()
    for shard in all_shards(count):
        folder = shard.folder(path)
        in_shard = Verified(folder, "cache", checked=1)
        with Store(folder) as store:
            _compare(store, in_shard)
        result.checked += in_shard.checked
        name = f"{FOLDER}/{folder.name}"
        result.damage += [replace(damage, where=f"{name}/{damage.where}") for damage in in_shard.damage]


def _compare(store: Store, result: Verified) -> list[bytes]:
    """Compare all entries with their checksums, note damage in the result, and return the keys of those without."""
    sizes = {view: entry_bytes(description) for view, description in store.views.items()}
    unchecked = []
    for key, entry in store.entries():
        view, item = key_names(key)
        size = sizes.get(view, 0)
        if fits(key, entry, size):
            result.checked += 1
        elif view in sizes and store.lacks_checksum(entry, size):
            unchecked.append(key)
        else:
            result.checked += 1
            result.damage.append(_damage(view, item, entry_problem(entry, size) if view in sizes else ""))
    return unchecked


def _damage(view: str, item: str, problem: str) -> Damage:
    """Return the damage of an entry. problem: "" for an entry of no view."""
    where = f"states.lmdb: view {view!r}, item {item!r}"
    if not problem:
        return Damage(where, "the cache has no view of this name", "it is not read; extract into a new cache")
    return Damage(where, problem, "iisan-fast extract encodes it again")
