"""Stores that are filled without an encoder."""

from __future__ import annotations

from pathlib import Path

from iisan_fast.states.entries import content_digest
from iisan_fast.states.feature_table import FeatureTable
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


def fill_store(path: Path, item_ids: list[str], table: FeatureTable, names: tuple[str, ...], **changes) -> Path:
    """Write a table's states into a store under some view names, in float32, and return its folder.

    changes: values that replace those of the views' descriptions.
    """
    with Store(path, writable=True) as store:
        store.add_views({name: view_description(*shape, **changes) for name, shape in zip(names, table.shapes)})
        for name, view in zip(names, table.views):
            digests = [content_digest(f"title of {item_id}".encode()) for item_id in item_ids]
            store.write(name, item_ids, digests, view[1:].float())
    return path
