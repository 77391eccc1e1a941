"""Stores that are filled without an encoder."""

from __future__ import annotations

from pathlib import Path

from iisan_fast.states.entries import content_digest
from iisan_fast.states.feature_table import FeatureTable
from iisan_fast.states.manifest import write_shard_count
from iisan_fast.states.shards import Shard, all_shards
from iisan_fast.states.store import Store


def view_description(layers: int, width: int, /, **changes) -> dict:
    """Return the description of a view that extraction would write into a store's manifest."""
    return {
        "source": "title",
        "unescaped": True,
        "layers": list(range(layers)),
        "depth": layers,
        "width": width,
        "dtype": "float32",
        **changes,
    }


def fill_store(
    path: Path,
    item_ids: list[str],
    table: FeatureTable,
    names: tuple[str, ...],
    shard: Shard | None = None,
    **changes,
) -> Path:
    """Write a table's states into a store under some view names, in float32, and return its folder.

    shard: the one that the store is. changes: values that replace those of the views' descriptions.
    """
    with Store(path, writable=True, shard=shard) as store:
        store.add_views({name: view_description(*shape, **changes) for name, shape in zip(names, table.shapes)})
        for name, view in zip(names, table.views):
            digests = [content_digest(f"title of {item_id}".encode()) for item_id in item_ids]
            store.write(name, item_ids, digests, view[1:].float())
        if shard is not None:
            store.finish_shard()
    return path


def fill_shards(path: Path, item_ids: list[str], table: FeatureTable, names: tuple[str, ...], count: int) -> Path:
    """Write a table's states into a cache in shards, as `fill_store` into a store, and return its folder."""
    path.mkdir()
    write_shard_count(path, count)
    for shard in all_shards(count):
        rows = [row for row, item_id in enumerate(item_ids) if shard.holds(item_id)]
        part = FeatureTable(tuple(view[[0, *(row + 1 for row in rows)]] for view in table.views))
        fill_store(shard.folder(path), [item_ids[row] for row in rows], part, names, shard)
    return path
