"""Open all shards of a cache for reading, and describe them as one cache."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..fingerprints import changed_settings
from .database import Database
from .manifest import FILE, FORMAT, read_manifest, read_shard_count
from .sharded_database import ShardedDatabase
from .shards import Shard, all_shards, shards_of_items

LOGGER = logging.getLogger(__name__)
Manifest = dict[str, Any]


def open_shards(cache: Path, count: int) -> tuple[ShardedDatabase, Manifest]:
    """Open all shards of a cache for reading. Return their databases as one, and their joined manifest.

    Raises InputError, with the command that makes it, for a shard that is missing, and as `joined_manifest` does.
    """
    databases = []
    manifests = {}
    with ExitStack() as opened:
        for shard in all_shards(count):
            refuse_missing_shard(cache, shard)
            folder = shard.folder(cache)
            database = Database(folder / "states.lmdb", folder, writable=False)
            opened.callback(database.close)
            databases.append(database)
            manifests[shard] = read_shard_manifest(cache, shard)  # after the database, as of a store
        manifest = joined_manifest(cache, manifests)
        opened.pop_all()
    return ShardedDatabase(databases), manifest


def refuse_missing_shard(cache: Path, shard: Shard) -> None:
    """Raise InputError, with the command that makes it, if a cache lacks a shard, or has just been merged."""
    folder = shard.folder(cache)
    if (folder / FILE).exists() and (folder / "states.lmdb" / "data.mdb").exists():
        return
    if read_shard_count(cache) != shard.count:
        raise InputError(f"{cache}: the cache was replaced while it was opened; run this again")
    refuse_lost_manifest(cache, shard)
    raise InputError(f"{cache}: shard {shard} is missing; {shard.command(cache)} makes it")


def refuse_lost_manifest(cache: Path, shard: Shard) -> None:
    """Raise InputError if the folder of a shard has states, but no manifest that describes them."""
    folder = shard.folder(cache)
    if (folder / "states.lmdb").exists() and not (folder / FILE).exists():
        raise InputError(
            f"{folder}: states.lmdb without {FILE}; restore that file, or remove the folder, then "
            f"{shard.command(cache)} makes it again"
        )


def read_shard_manifest(cache: Path, shard: Shard) -> Manifest:
    """Return the manifest of a shard. Raises InputError if it is none, or that of another shard or of a whole cache."""
    folder = shard.folder(cache)
    manifest = read_manifest(folder)
    refuse_other_shard(folder, manifest, shard)
    return manifest


def refuse_other_shard(folder: Path, manifest: Manifest, shard: Shard) -> None:
    """Raise InputError unless the manifest of a folder is that of a shard. Caches of format 1 are no shards."""
    held = manifest.get("shard", "no shard")
    if held != str(shard) or manifest["format"] != FORMAT:
        raise InputError(f"{folder / FILE}: expected shard {shard}, found {held}; restore the folder, or remove it")


def joined_manifest(cache: Path, manifests: Mapping[Shard, Manifest]) -> Manifest:
    """Return the manifest of all shards as one cache.

    It has the views, under "lacking" the first shard that lacks a view, and under "unfinished" the shards that are not
    finished. Raises InputError if two shards have made a view with other encoders or settings. Other versions of
    libraries are mentioned once.
    """
    views: dict[str, tuple[Shard, Manifest]] = {}
    for shard, manifest in manifests.items():
        for name, description in manifest["views"].items():
            first, described = views.setdefault(name, (shard, description))
            if different := changed_settings(described, description):
                raise InputError(
                    f"{cache}: view {name!r} of shard {shard} was made with other settings than that of shard {first}: "
                    f"{'; '.join(different)}; remove {shard.folder(cache)}, then {shard.command(cache)} makes it"
                )
            if described.get("versions") != description.get("versions"):
                _mention_versions(cache, name, first, shard)
    lacking: dict[str, Shard] = {}
    for shard, manifest in manifests.items():
        for name in views.keys() - manifest["views"]:
            lacking.setdefault(name, shard)
    descriptions = {name: description for name, (_, description) in views.items()}
    unfinished = [shard for shard, manifest in manifests.items() if manifest.get("unfinished")]
    joined = {"format": FORMAT, "shards": len(manifests), "views": descriptions}
    return {**joined, "lacking": lacking, "unfinished": unfinished}


def lacking_text(cache: Path, missing: list[str], count: int) -> str:
    """Return the shards that lack items, and the command that stores them."""
    shards = shards_of_items(missing, count)
    if len(shards) == 1:
        return f"all of shard {shards[0]}; run {shards[0].command(cache)}"
    numbers = ", ".join(str(shard.number) for shard in shards)
    return f"of shards {numbers} of {count}; run iisan-fast extract"


@functools.cache
def _mention_versions(cache: Path, view: str, first: Shard, shard: Shard) -> None:
    """Log that two shards of a view were stored under other versions of libraries."""
    LOGGER.warning("%s: shards %s and %s of view %r have other library versions", cache, first.number, shard, view)
