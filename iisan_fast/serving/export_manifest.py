"""Describe an exported folder in its export.json, by which a program without this package can score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..models import TERM_CONSTANTS
from .trained_model import TrainedModel

MANIFEST = "export.json"
EXPORT_FORMAT = 1
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "scipy")
FORMULA = {
    "score": "states . item_vectors + cold_bias * is_cold + similarity * profile . coordinates"
    " + cooccurrence * log(1 + sums_factor * sums); a term of weight 0 is left out",
    "states": "sequence_encoder.onnx of the vectors of the last max_inputs items, right-aligned, zeros before them",
    "is_cold": "1 for an item with training_count 0, else 0",
    "profile": "the sum of profile_weights[age] * coordinates over the last items, the newest of age 0, scaled to"
    " length 1",
    "coordinates": "of a new item: ((final states of its views, joined) - mean) / scale, times basis, scaled to"
    " length 1; mean, scale and basis are in projection.npz",
    "sums": "the sum of decay^age * cooccurrence row over the last `recent` items, the newest of age 0",
    "without_history": "popularity_weight * log(max(training_count, least_count))",
    "order": "by falling score, and of equal scores by row; items of the history and removed items are left out",
    "index": "rows by inner product of [states, cold_bias, similarity * profile] and [item_vectors, is_cold,"
    " coordinates], without the parts of weight 0; removed items are not in it",
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
        "dimension": catalogue.vectors.shape[1],
        "max_inputs": model.config.protocol.max_inputs,
        "weights": model.weights._asdict(),
        "constants": TERM_CONSTANTS,
        "formula": FORMULA,
        "versions": {"iisan_fast": __version__, **{name: metadata.version(name) for name in LIBRARIES}},
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write export.json into a folder with the size and the SHA-256 of every file in it, and return its content."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    content = {**manifest, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
