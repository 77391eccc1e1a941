"""Write the tables of an exported run: item vectors, ids and the co-occurrence matrix."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, save_npz

from ...models import CoOccurrence, popularity_scores
from ..growing.catalogue import Catalogue
from ..trained_model import TrainedModel

ITEM_VECTORS, PROJECTION, COOCCURRENCE = "item_vectors.npy", "projection.npz", "cooccurrence.npz"
ITEMS, ITEMS_TABLE = "items.jsonl", "items.parquet"
NO_POLARS = f"{ITEMS_TABLE}: needs polars; pip install 'iisan-fast[import]'"


def write_tables(model: TrainedModel, folder: Path) -> list[str]:
    """Write all tables of a model into a folder, and return a line for each that had to be left out.

    The vectors of removed items are there too, because a history may hold such items.
    """
    catalogue = model.catalogue
    np.save(folder / ITEM_VECTORS, model.joined.cpu().numpy())
    if model.weights.similarity and model.similarity is not None:
        projection = {name: getattr(model.similarity, name).numpy() for name in ("mean", "scale", "basis")}
        np.savez(folder / PROJECTION, **projection)
    save_npz(folder / COOCCURRENCE, cooccurrence_matrix(model.cooccurrence, len(catalogue.item_ids)))
    rows = _item_rows(catalogue)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / ITEMS).write_text("".join(lines), encoding="utf-8")
    if find_spec("polars") is None:
        return [NO_POLARS]
    _write_items_table(rows, catalogue.vectors.cpu().numpy(), folder / ITEMS_TABLE)
    return []


def cooccurrence_matrix(cooccurrence: CoOccurrence, items: int) -> csr_array:
    """Return the matrix as scipy's, float32 [items, items]; items that were added after training have empty rows."""
    added = items - (len(cooccurrence.offsets) - 1)
    offsets = np.concatenate([cooccurrence.offsets, np.full(added, cooccurrence.offsets[-1])])
    return csr_array((cooccurrence.values, cooccurrence.items, offsets), shape=(items, items))


def _item_rows(catalogue: Catalogue) -> list[dict[str, Any]]:
    """Return a row for each item, in the order of the vectors. popularity: the score without a history."""
    counts = catalogue.training_counts
    popularity = popularity_scores(counts, 0, torch.device("cpu"))[1][:, 0]
    columns = {
        "item_id": catalogue.item_ids,
        "title": catalogue.titles or [None] * len(catalogue.item_ids),
        "training_count": counts[1:].tolist(),
        "popularity": popularity.tolist(),
        "removed": catalogue.is_removed.tolist(),
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _write_items_table(rows: list[dict[str, Any]], vectors: np.ndarray, path: Path) -> None:
    """Write the rows as Parquet, with the model's item vectors [items, d]."""
    import polars  # an extra

    schema = {
        "item_id": polars.String,
        "title": polars.String,
        "training_count": polars.Int64,
        "popularity": polars.Float32,
        "removed": polars.Boolean,
    }
    vector = polars.Series(
        "vector", np.ascontiguousarray(vectors), dtype=polars.Array(polars.Float32, vectors.shape[1])
    )
    polars.DataFrame(rows, schema=schema).with_columns(vector).write_parquet(path)
