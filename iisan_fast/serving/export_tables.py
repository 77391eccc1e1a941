"""Write the tables of an exported run: item vectors, coordinates, ids and the co-occurrence matrix."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, save_npz

from ..models import CoOccurrence
from .catalogue import Catalogue
from .trained_model import TrainedModel

ITEM_VECTORS, COORDINATES, PROJECTION = "item_vectors.npy", "coordinates.npy", "projection.npz"
ITEMS, ITEMS_TABLE, COOCCURRENCE = "items.jsonl", "items.parquet", "cooccurrence.npz"
NO_POLARS = f"{ITEMS_TABLE}: needs polars; pip install 'iisan-fast[import]'"


class ItemTables(NamedTuple):
    """The arrays that score items, row i for item number i + 1."""

    vectors: np.ndarray  # float32 [items, d], of removed items too: a history may hold them
    coordinates: np.ndarray | None  # float32 [items, dims]; None if the weight of similarity is 0


def write_tables(model: TrainedModel, folder: Path) -> list[str]:
    """Write all tables of a model into a folder, and return a line for each that had to be left out."""
    tables = item_tables(model)
    catalogue = model.catalogue
    np.save(folder / ITEM_VECTORS, tables.vectors)
    if tables.coordinates is not None and model.similarity is not None:
        np.save(folder / COORDINATES, tables.coordinates)
        projection = {name: getattr(model.similarity, name).numpy() for name in ("mean", "scale", "basis")}
        np.savez(folder / PROJECTION, **projection)
    save_npz(folder / COOCCURRENCE, cooccurrence_matrix(model.cooccurrence, len(catalogue.item_ids)))
    _write_items(catalogue, folder / ITEMS)
    if find_spec("polars") is None:
        return [NO_POLARS]
    _write_items_table(catalogue, tables.vectors, folder / ITEMS_TABLE)
    return []


def item_tables(model: TrainedModel) -> ItemTables:
    """Return the vectors of all items on the host, and their coordinates if the run's scores have similarity."""
    vectors = model.catalogue.vectors.float().cpu().numpy()
    if not model.weights.similarity or model.catalogue.coordinates is None:
        return ItemTables(vectors, None)
    return ItemTables(vectors, model.catalogue.coordinates.float().cpu().numpy())


def cooccurrence_matrix(cooccurrence: CoOccurrence, items: int) -> csr_array:
    """Return the matrix as scipy's, float32 [items, items]; items that were added after training have empty rows."""
    added = items - (len(cooccurrence.offsets) - 1)
    offsets = np.concatenate([cooccurrence.offsets, np.full(added, cooccurrence.offsets[-1])])
    return csr_array((cooccurrence.values, cooccurrence.items, offsets), shape=(items, items))


def _write_items(catalogue: Catalogue, path: Path) -> None:
    """Write a line of JSON for each item, in the order of the vectors."""
    titles = catalogue.titles or [None] * len(catalogue.item_ids)
    counts = catalogue.training_counts[1:].tolist()
    with path.open("w", encoding="utf-8") as file:
        for item_id, title, count, removed in zip(catalogue.item_ids, titles, counts, catalogue.is_removed.tolist()):
            row = {"item_id": item_id, "title": title, "training_count": count, "removed": removed}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_items_table(catalogue: Catalogue, vectors: np.ndarray, path: Path) -> None:
    """Write the same rows with the item vectors as Parquet."""
    import polars  # an extra

    columns = {
        "item_id": polars.Series(catalogue.item_ids, dtype=polars.String),
        "title": polars.Series(catalogue.titles or [None] * len(catalogue.item_ids), dtype=polars.String),
        "training_count": polars.Series(catalogue.training_counts[1:]),
        "removed": polars.Series(catalogue.is_removed),
        "vector": polars.Series(vectors, dtype=polars.Array(polars.Float32, vectors.shape[1])),
    }
    polars.DataFrame(columns).write_parquet(path)
