"""Export a trained run: its item vectors, its encoders as ONNX and as programs of PyTorch, and an index."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ...files import whole_folder
from ...fingerprints import file_digest
from ...training import RunFolder
from ..histories.user_histories import UserHistories
from ..trained_model import TrainedModel
from .export_manifest import describe_model, write_manifest
from .export_tables import ITEM_VECTORS, ITEMS, write_tables
from .exported_encoders import ExportedEncoder, item_encoder_of, random_histories, sequence_encoder_of
from .index_files import IndexedVectors, index_file, open_index, refuse_missing_library, write_index
from .index_recall import CANDIDATES, Recall, recall_of_index
from .module_files import WrittenModule, write_module

LOGGER = logging.getLogger(__name__)
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
CPU = torch.device("cpu")
MEASURED_USERS = 2000  # by which an index is measured, at most


@dataclass(frozen=True)
class ExportReport:
    """The content of an exported folder."""

    folder: Path
    files: dict[str, int]  # bytes by name
    left_out: list[str]  # a line for each part that the folder lacks
    compared: dict[str, dict[str, Any]]  # of each encoder: on what, and the largest deviation of each file
    index: Recall | None  # of the index; None without one


def export(run: Path, folder: Path, index: str | None = None, device: torch.device = CPU) -> ExportReport:
    """Write a run's item vectors and encoders into a new folder, whole or not at all, and return what it holds.

    index: "faiss" or "usearch" for an index, whose recall is measured. device: of the run's own results, with which the
    written files are compared. Raises InputError if the folder exists, if the run cannot be loaded, if a library is
    missing, or if a written file does not give the run's results to 1e-5.
    """
    refuse_missing_libraries(index)
    with whole_folder(folder) as temporary:
        model = TrainedModel.load(run, device)
        left_out = write_tables(model, temporary)
        encoders, lines = _encoders(model)
        described = {}
        compared = {}
        for encoder in encoders:
            name = encoder.portable.name
            LOGGER.info("export: %s", name)
            opsets = write_module(encoder.portable, temporary)
            deviations = WrittenModule(encoder.portable, temporary).deviations(encoder.cases)
            described[name] = {
                "inputs": encoder.portable.shapes(),
                "outputs": encoder.portable.outputs,
                "opsets": opsets,
            }
            compared[name] = {"on": encoder.compared, "largest_deviation": deviations}
        manifest = {**describe_model(model), "left_out": [*left_out, *lines], "encoders": described, "index": None}
        recall = None
        if index is not None:
            LOGGER.info("export: index by %s", index)
            manifest["index"], recall = _with_index(model, index, temporary)
        manifest = write_manifest(temporary, {**manifest, "compared": compared})
    return ExportReport(folder, manifest["bytes"], manifest["left_out"], compared, recall)


def refuse_missing_libraries(index: str | None) -> None:
    """Raise InputError if a library that an export needs is not installed."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise InputError(f"export: {', '.join(missing)} not installed; pip install 'iisan-fast[export]'")
    if index is not None:
        refuse_missing_library(index)


def _encoders(model: TrainedModel) -> tuple[list[ExportedEncoder], list[str]]:
    """Return the encoders of a run that can be written, and a line for each that cannot."""
    item_encoder = item_encoder_of(model)
    if isinstance(item_encoder, str):
        return [sequence_encoder_of(model)], [item_encoder]
    return [sequence_encoder_of(model), item_encoder], []


def _with_index(model: TrainedModel, kind: str, folder: Path) -> tuple[dict[str, Any], Recall]:
    """Write an index into a folder, open it again, and return its description and its recall."""
    rows = np.flatnonzero(~model.catalogue.is_removed)
    indexed = IndexedVectors(rows, np.ascontiguousarray(model.joined.cpu().numpy()[rows]))
    write_index(kind, indexed, folder)
    histories, source = _measured_histories(model)
    recall = recall_of_index(model, histories, open_index(kind, indexed, folder))
    description = {
        "kind": kind,
        "file": index_file(kind),
        "items": len(rows),
        "dimension": indexed.vectors.shape[1],
        "built_from": {name: file_digest(folder / name) for name in (ITEM_VECTORS, ITEMS)},
        "measured": {**asdict(recall), "candidates": CANDIDATES, "histories": source},
    }
    return description, recall


def _measured_histories(model: TrainedModel) -> tuple[UserHistories, str]:
    """Return histories by which an index is measured, and their source in words."""
    folder = RunFolder(model.run)
    generator = np.random.default_rng(0)
    if not folder.has_histories:
        return random_histories(model, MEASURED_USERS, generator), "random items, because the run has no histories"
    sequences = folder.sequences
    users = len(sequences.user_ids)
    chosen = np.sort(generator.choice(users, min(users, MEASURED_USERS), replace=False))
    parts = [sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]] for user in chosen]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    user_ids = [sequences.user_ids[user] for user in chosen]
    return UserHistories(user_ids, offsets, np.concatenate(parts)), "whole histories of the run's users"
