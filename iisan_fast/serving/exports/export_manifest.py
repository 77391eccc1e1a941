"""Describe an exported folder in its export.json, by which a program without this package can score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import __version__
from ...fingerprints import file_digest
from ...models import TERM_CONSTANTS
from ..trained_model import TrainedModel
from .query_encoder import history_width

MANIFEST = "export.json"
EXPORT_FORMAT = 1
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "scipy")
FORMULA = {
    "score": "queries . item_vectors + weights.cooccurrence * log(1 + sums_factor * sums)",
    "queries": "output of sequence_encoder.onnx for the rows of item_vectors.npy of the last history_width items,"
    " right-aligned, with zeros before them, and the number of these items: the state, cold_bias if it is not 0,"
    " and similarity * profile if similarity is not 0",
    "item_vectors": "columns as in `columns`: the vector of the model; 1 for an item without training interactions,"
    " else 0; the coordinates of similarity",
    "profile": "the sum of profile_weights[age] * coordinates over the last items, the newest of age 0, scaled to"
    " length 1",
    "coordinates": "of a new item: ((final states of its views, joined) - mean) / scale, times basis, scaled to"
    " length 1, where mean, scale and basis are in projection.npz",
    "sums": "the sum of decay^age * the item's row of cooccurrence.npz over the last `recent` items, the newest of"
    " age 0",
    "without_history": "popularity of items.jsonl: popularity_weight * log(max(training_count, least_count))",
    "order": "by falling score, and of equal scores by row; the items of the history and removed items are left out",
}


def describe_model(model: TrainedModel) -> dict[str, Any]:
    """Return what a program needs to score by a model's exported tables, as JSON values."""
    catalogue = model.catalogue
    return {
        "format": EXPORT_FORMAT,
        "method": model.config.model.method,
        "best_epoch": model.epoch,
        "items": len(catalogue.item_ids),
        "available": catalogue.available,
        "max_inputs": model.config.protocol.max_inputs,
        "history_width": history_width(model),
        "columns": _columns(model),
        "weights": model.weights._asdict(),
        "constants": TERM_CONSTANTS,
        "formula": FORMULA,
        "versions": {"iisan_fast": __version__, **{name: metadata.version(name) for name in LIBRARIES}},
    }


def _columns(model: TrainedModel) -> dict[str, int]:
    """Return the number of columns of each part of the joined vectors, in their order."""
    d = model.catalogue.vectors.shape[1]
    bias = int(bool(model.weights.cold_bias))
    return {"model": d, "is_cold": bias, "coordinates": model.joined.shape[1] - d - bias}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write export.json into a folder with the size and the SHA-256 of every file in it, and return its content."""
    files = sorted(folder.iterdir())
    sizes = {path.name: path.stat().st_size for path in files}
    content = {**manifest, "bytes": sizes, "sha256": {path.name: file_digest(path) for path in files}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content
