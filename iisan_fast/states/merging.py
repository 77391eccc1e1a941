"""Merge the shards of a cache into one store, which takes their place.

The cache is in shards until its manifest is replaced, and a whole one from then on. What a killed process leaves behind
is removed by the next one.
"""

from __future__ import annotations

import heapq
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, Stopped
from ..files import keep_names, locked, refuse_unwritable, whole_folder
from ..progress import progress_bar
from ..stop_signals import stop_requests
from .database import Database
from .entries import entry_bytes, entry_problem, fits, key_names
from .joined_shards import Manifest, open_shards, refuse_missing_shard
from .manifest import FORMAT, read_manifest, read_shard_count, refuse_no_cache, write_manifest
from .placement import size_text
from .sharded_database import ShardedDatabase
from .shards import FOLDER, Shard, all_shards, shard_of
from .state_writer import GROUP_BYTES, GROUP_ITEMS

LOGGER = logging.getLogger(__name__)
DATABASE = "states.lmdb"
Entry = tuple[bytes, memoryview, Shard]  # key, value, and the shard that it comes from


@dataclass(frozen=True)
class Merged:
    """The result of merging the shards of a cache."""

    cache: str
    shards: int
    entries: int  # an entry for each item and view
    entry_bytes: int


def merge_shards(cache: Path) -> Merged:
    """Copy all shards of a cache into one store, remove the shards, and return what was copied.

    Every entry is compared with its checksum. Raises InputError, with the cache still in shards, if a shard is missing,
    unfinished, lacks a view or is being written, if an entry is damaged, or if the disk has no room for a second copy.
    Raises Stopped, likewise, after a signal.
    """
    refuse_no_cache(cache)
    refuse_unwritable(cache)
    busy = f"{cache}: another process writes to this cache or merges it; wait for it to end"
    with locked(cache / "lock", busy):
        count = read_shard_count(cache)
        if count is not None:
            result = _merge(cache, count)
        else:
            result = Merged(str(cache), read_manifest(cache).get("merged", 0), 0, 0)
        if not result.shards:
            raise InputError(f"{cache}: the cache has no shards, so there is nothing to merge")
        _remove_shards(cache, result.shards)
    return result


def _merge(cache: Path, count: int) -> Merged:
    """Make one store of the shards of a cache, and the manifest that puts it in their place. The shards stay."""
    with ExitStack() as opened:
        for shard in all_shards(count):
            refuse_missing_shard(cache, shard)
            busy = f"{shard.folder(cache)}: an extraction is writing to this shard; wait for it to end"
            opened.enter_context(locked(shard.folder(cache) / "lock", busy))
        database, manifest = open_shards(cache, count)
        opened.enter_context(closing(database))
        _refuse_unfinished(cache, manifest)
        if (cache / DATABASE).exists():  # of a merging process that was killed before it wrote the manifest
            shutil.rmtree(cache / DATABASE)
        _refuse_little_room(cache, database)
        with whole_folder(cache / DATABASE) as folder:
            result = _copy(cache, database, manifest, folder)
            keep_names(folder)
        write_manifest(cache, {"format": FORMAT, "merged": count, "views": manifest["views"]})
    return result


def _copy(cache: Path, source: ShardedDatabase, manifest: Manifest, folder: Path) -> Merged:
    """Copy all entries into a new database in a folder. Raises InputError for a damaged one, Stopped after a signal."""
    sizes = {view: entry_bytes(description) for view, description in manifest["views"].items()}
    count = len(source.databases)
    copied = 0
    size = 0
    with (
        stop_requests() as request,
        progress_bar(f"merging {count} shards", source.entry_count, "entries") as advance,
        closing(Database(folder, cache, writable=True)) as target,
        source.read_ahead(),
    ):
        for group in _groups(_sound_entries(cache, source, sizes)):
            target.put(group)
            copied += len(group)
            size += sum(len(value) for _, value in group)
            advance(len(group))
            if request.signal_number is not None and copied < source.entry_count:
                raise Stopped(f"{cache}: is still in {count} shards; nothing was changed", request.signal_number)
    return Merged(str(cache), count, copied, size)


def _sound_entries(cache: Path, source: ShardedDatabase, sizes: dict[str, int]) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the key and the value of all entries, in the order of the keys. sizes: of an entry of each view.

    Raises InputError for an entry that does not fit its checksum, or that lies in another shard than its item. An entry
    of no view is left out, because nothing reads it.
    """
    count = len(source.databases)
    by_shard = zip(all_shards(count), source.databases)
    for key, value, shard in heapq.merge(*(_entries_of(*one) for one in by_shard), key=lambda entry: entry[0]):
        view, item = key_names(key)
        where = f"{shard.folder(cache)}: view {view!r}, item {item!r}"
        if view not in sizes:
            LOGGER.warning("%s: the cache has no view of this name; the entry is left out", where)
            continue
        if not fits(key, value, sizes[view]):
            problem = entry_problem(value, sizes[view])
            raise InputError(f"{where}: {problem}; {shard.command(cache)} encodes it again")
        item_id = key.partition(b"\0")[2]
        if not item_id.startswith(b"\0") and shard_of(item_id, count) != shard.number - 1:
            raise InputError(f"{where}: belongs to another shard; remove the folder, then {shard.command(cache)}")
        yield key, value


def _entries_of(shard: Shard, database: Database) -> Iterator[Entry]:
    """Yield the entries of a shard with the shard."""
    for key, value in database.entries():
        yield key, value, shard


def _groups(entries: Iterator[tuple[bytes, memoryview]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield copies of the entries in groups, each for one transaction."""
    group: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in entries:
        group.append((key, bytes(value)))
        size += len(value)
        if len(group) == GROUP_ITEMS or size >= GROUP_BYTES:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _refuse_unfinished(cache: Path, manifest: Manifest) -> None:
    """Raise InputError, with the command that finishes it, if a shard is unfinished or lacks a view."""
    for view, shard in manifest["lacking"].items():
        raise InputError(f"{cache}: shard {shard} lacks view {view!r}; {shard.command(cache)} makes it")
    for shard in manifest["unfinished"]:
        raise InputError(f"{cache}: shard {shard} is unfinished; {shard.command(cache)} goes on with it")


def _refuse_little_room(cache: Path, source: ShardedDatabase) -> None:
    """Raise InputError if the disk has no room for a second copy of all entries."""
    free = shutil.disk_usage(cache).free
    if free < source.size:
        raise InputError(
            f"{cache}: merging needs {size_text(source.size)} on its disk for a second copy, found {size_text(free)}; "
            "make room and run again"
        )


def _remove_shards(cache: Path, count: int) -> None:
    """Remove the shards of a cache that is merged. Raises InputError if they cannot be removed."""
    try:
        for shard in all_shards(count):
            if shard.folder(cache).exists():
                shutil.rmtree(shard.folder(cache))
        if (cache / FOLDER).exists() and not any((cache / FOLDER).iterdir()):
            (cache / FOLDER).rmdir()
    except OSError as error:
        reason = f"{error.filename} cannot be removed ({error.strerror})"
        raise InputError(f"{cache}: the cache is merged, but {reason}; remove {cache / FOLDER}") from None
    manifest = read_manifest(cache)
    manifest.pop("merged", None)
    write_manifest(cache, manifest)
