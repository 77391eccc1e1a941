"""Read and write a cache's manifest: its format, the description of each view, and a checksum of both.

Format 2 says that the manifest and every entry have a checksum. Caches of format 1 have none in the manifest, and none
in the entries that an earlier version wrote. A cache in shards has a small manifest of format 3, which holds the number
of the shards; the folder of each is a store with a manifest of format 2.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..checksums import checksum
from ..config import FEATURES, MISSING_CAPTIONS, SOURCES, STORE_DTYPES
from ..errors import InputError, with_remedy
from ..files import write_atomically
from ..fingerprints import changed_settings
from ..settings_files import format_number, read_settings
from .shards import FOLDER, MOST_SHARDS, Shard

UNCHECKED_FORMAT, FORMAT, SHARDED_FORMAT = 1, 2, 3
FILE = "manifest.json"


def new_manifest(shard: Shard | None = None) -> dict[str, Any]:
    """Return the manifest of a cache without views, or of a shard, which is unfinished until all its items are stored.

    Only a shard records which one it is, and if it is unfinished.
    """
    mark = {} if shard is None else {"shard": str(shard), "unfinished": True}
    return {"format": FORMAT, **mark, "views": {}}


def refuse_no_cache(path: Path) -> None:
    """Raise InputError if a folder has no manifest."""
    if (path / FILE).exists():
        return
    if (path / FOLDER).exists():
        raise InputError(
            f"{path}: {FOLDER} without {FILE}; restore that file: iisan-fast extract --shard with one of the shards "
            "writes it again"
        )
    if (path / "states.lmdb").exists():
        raise InputError(f"{path}: states.lmdb without {FILE}; restore that file, or choose another cache")
    raise InputError(f"{path}: not a cache of hidden states (no {FILE}); run iisan-fast extract")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the cache `path`, without its checksum.

    Raises InputError if it is missing, is not one, or does not fit its checksum.
    """
    refuse_no_cache(path)
    file = path / FILE
    manifest = read_settings(file)
    number = format_number(manifest, file, (UNCHECKED_FORMAT, FORMAT), "extract into a new cache")
    recorded = manifest.pop("checksum", None)
    if number == FORMAT and recorded != _checksum(manifest):
        raise InputError(
            f"{file}: its checksum does not fit, so it was damaged or edited; restore it, or extract into a new cache"
        )
    views = manifest.get("views")
    if not isinstance(views, dict) or not all(map(describes_view, views.values())):
        raise InputError(f"{file}: not a manifest of hidden states; extract into a new cache")
    return manifest


def read_shard_count(path: Path) -> int | None:
    """Return the number of shards of the cache `path`; None if it is not in shards.

    Raises InputError if its manifest is missing, or is a damaged one of shards.
    """
    refuse_no_cache(path)
    file = path / FILE
    manifest = read_settings(file)
    if manifest.get("format") != SHARDED_FORMAT:
        return None
    recorded = manifest.pop("checksum", None)
    count = manifest.get("shards")
    if recorded != _checksum(manifest) or type(count) is not int or not 1 <= count <= MOST_SHARDS:
        raise InputError(
            f"{file}: its checksum does not fit, so it was damaged or edited; restore it, or remove it and give "
            "iisan-fast extract the same --shard again"
        )
    return count


def write_shard_count(path: Path, count: int) -> None:
    """Write the manifest of a cache in shards as a whole or not at all. Raises InputError as `write_manifest` does."""
    write_manifest(path, {"format": SHARDED_FORMAT, "shards": count})


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the cache `path` as a whole or not at all. One of format 2 or 3 gets its checksum.

    Raises InputError if it cannot be written, as on a full disk.
    """
    summed = {"checksum": _checksum(manifest)} if manifest["format"] != UNCHECKED_FORMAT else {}
    try:
        write_atomically(path / FILE, json.dumps(manifest | summed, indent=2).encode())
    except OSError as error:
        message = with_remedy(f"{path / FILE}: cannot be written ({error.strerror})", error.errno)
        raise InputError(f"{message}; what is stored stays") from None


def refuse_other_settings(
    path: Path, views: Mapping[str, Mapping[str, Any]], descriptions: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise InputError, with the differences, if a view of a store was made with other encoders or settings.

    path: of the store. views: its descriptions by name. descriptions: of the views to add; new ones are not checked.
    """
    for name, description in descriptions.items():
        if different := changed_settings(views.get(name, description), description):
            raise InputError(
                f"{path}: view {name!r} was made with other settings: {'; '.join(different)}; "
                f"restore the old settings or choose another cache"
            )


def describes_view(value: Any, sources: Collection[str] = SOURCES) -> bool:
    """Return True if a JSON value is an object with all that reading a view needs, in kinds and ranges that can be.

    sources: that the view may have; those of encoders by default.
    """
    if not isinstance(value, dict):
        return False
    layers, depth, width = value.get("layers"), value.get("depth"), value.get("width")
    numbers = [depth, width, *layers] if isinstance(layers, list) else [None]
    return (
        all(type(number) is int for number in numbers)  # not isinstance: True is an int
        and bool(layers)
        and list(layers) == sorted({layer for layer in layers if 0 <= layer < depth})
        and width > 0
        and value.get("dtype") in STORE_DTYPES
        and value.get("source") in sources
        and type(value.get("first_layer", 0)) is int
        and value.get("missing_captions", "error") in MISSING_CAPTIONS
        and isinstance(value.get("versions", {}), dict)
        and (value["source"] in ("image", FEATURES) or type(value.get("unescaped")) is bool)
    )


def _checksum(manifest: dict[str, Any]) -> str:
    """Return the checksum (hex) of a manifest's values; the order of keys counts, white space does not."""
    return checksum(json.dumps(manifest).encode()).hex()
