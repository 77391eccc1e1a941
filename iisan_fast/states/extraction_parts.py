"""Divide an extraction into parts: the stores that this process fills, and the rows of the catalogue that each holds.

A cache has one part, or a part for each shard. The shards are shared out among the ranks of a job: shard s goes to rank
s - 1, modulo the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..ranks import Ranks
from .joined_shards import refuse_lost_manifest
from .manifest import (
    FILE,
    read_manifest,
    read_shard_count,
    refuse_no_cache,
    refuse_other_settings,
    write_shard_count,
)
from .shards import FOLDER, MOST_SHARDS, Shard, all_shards, shard_of
from .store import Store


@dataclass(frozen=True)
class Part:
    """A store that an extraction fills, and the rows of the catalogue that it holds."""

    cache: Path
    shard: Shard | None  # None: the whole cache
    rows: Sequence[int]
    can_write: bool = True  # False: several ranks read the store, and none writes it

    @property
    def path(self) -> Path:
        """Return the folder of the store."""
        return self.cache if self.shard is None else self.shard.folder(self.cache)

    def refuse_other_views(self, descriptions: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise InputError if a shard of the cache has a view that was made with other encoders or settings.

        descriptions: of the views to add, by name. Shards that do not exist yet are not checked.
        """
        for shard in () if self.shard is None else all_shards(self.shard.count):
            folder = shard.folder(self.cache)
            if (folder / FILE).exists():
                refuse_other_settings(folder, read_manifest(folder)["views"], descriptions)

    def open_existing(self, as_writer: bool) -> Store | None:
        """Open the store if it exists; None if it does not. Raises InputError as `Store` does.

        as_writer: refuse a store that another process writes to.
        """
        if self.shard is not None:
            refuse_lost_manifest(self.cache, self.shard)
        writable = as_writer and self.can_write
        begun = (self.path / "states.lmdb" / "data.mdb").exists() or writable or self.shard is None
        return Store(self.path, writable, self.shard) if begun and (self.path / FILE).exists() else None

    def open(self) -> Store:
        """Open the store for writing. Raises InputError as `Store` does, or if the cache was merged meanwhile."""
        self._refuse_merged()
        store = Store(self.path, writable=True, shard=self.shard)
        try:
            self._refuse_merged()  # a process that merges holds the lock until the cache is a whole one
        except BaseException:
            store.close()
            raise
        return store

    def _refuse_merged(self) -> None:
        """Raise InputError if this is a shard, and the cache is in other shards now, or in none."""
        if self.shard is not None:
            _refuse_other_count(self.cache, read_shard_count(self.cache), self.shard)


def planned_shard_count(cache: Path, shard: Shard | None, ranks: Ranks) -> int | None:
    """Return the number of shards that a cache has or will have; None for a whole cache. Nothing is written.

    shard: the only one to fill; None for all of them. Raises InputError if the cache has other shards, or none.
    """
    if shard is not None and ranks.several:
        raise InputError(f"shard: {ranks.count} ranks fill all shards; leave out shard {shard}, or the launcher")
    if (cache / FILE).exists():
        count = read_shard_count(cache)
        if shard is not None:
            _refuse_other_count(cache, count, shard)
        return count
    if ranks.count > MOST_SHARDS:
        raise InputError(f"{cache}: expected at most {MOST_SHARDS} ranks, found {ranks.count}; start fewer")
    if shard is None and not ranks.several:
        if (cache / FOLDER).exists():
            refuse_no_cache(cache)
        return None
    count = ranks.count if shard is None else shard.count
    _refuse_other_folders(cache, count)
    return count


def _refuse_other_folders(cache: Path, count: int) -> None:
    """Raise InputError if a cache that has lost its manifest has shards of another number than `count`."""
    expected = {shard.folder(cache).name for shard in all_shards(count)}
    present = sorted(path.name for path in (cache / FOLDER).iterdir()) if (cache / FOLDER).is_dir() else []
    if others := [name for name in present if name not in expected]:
        raise InputError(
            f"{cache}: {FILE} is missing, and {FOLDER}/{others[0]} is none of {count} shards; restore that file, "
            "give --shard with one of the shards, or choose another cache"
        )


def parts_of_process(
    cache: Path, count: int | None, item_ids: Sequence[str], shard: Shard | None, ranks: Ranks
) -> list[Part]:
    """Return the parts of the catalogue that this process extracts into a cache. Nothing is written.

    count: of the cache's shards; None for a whole cache, of which each of several ranks reads a share and none writes.
    shard: the only one to fill; None for all of them.
    """
    if count is None:
        return [Part(cache, None, _rows(item_ids, ranks.count)[ranks.rank], can_write=not ranks.several)]
    rows = _rows(item_ids, count)
    mine = all_shards(count)[ranks.rank :: ranks.count] if shard is None else [shard]
    return [Part(cache, shard, rows[shard.number - 1]) for shard in mine]


def begin_cache(cache: Path, count: int | None, rows: int, ranks: Ranks) -> None:
    """Make the folder and the manifest of a cache in shards, unless they exist. Every rank calls it.

    count: of its shards; None for a whole cache. rows: that this rank has to encode. Raises InputError if several ranks
    would have to write a whole cache, or if the manifest cannot be written.
    """
    if count is not None:
        ranks.first_does(lambda: _begin_shards(cache, count))
        ranks.all_do(lambda: _begin_shards(cache, count))  # on machines that do not share the folder
    elif ranks.several and (total := sum(ranks.from_all(rows))):
        raise InputError(
            f"{cache}: the cache has no shards, and only one process can write the {total} states that it lacks; "
            "extract without a launcher, or choose another cache"
        )


def _begin_shards(cache: Path, count: int) -> None:
    """Make the folder and the manifest of a cache in shards, unless they exist. Raises InputError if it cannot."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / FILE).exists():
        write_shard_count(cache, count)
    _refuse_other_count(cache, read_shard_count(cache), Shard(1, count))


def _refuse_other_count(cache: Path, count: int | None, shard: Shard) -> None:
    """Raise InputError unless a cache has the number of shards of which `shard` is one. count: None for none."""
    if count is None:
        raise InputError(f"{cache}: the cache has no shards, expected {shard.count}; leave shard out")
    if count != shard.count:
        raise InputError(f"{cache}: the cache has {count} shards, expected {shard.count}; name one of its shards")


def _rows(item_ids: Sequence[str], count: int) -> list[Sequence[int]]:
    """Return the rows of each of `count` shards in order."""
    if count == 1:
        return [range(len(item_ids))]
    rows: list[list[int]] = [[] for _ in range(count)]
    for row, item_id in enumerate(item_ids):
        rows[shard_of(item_id, count)].append(row)
    return list(rows)
