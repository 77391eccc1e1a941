"""Begin a new run with the weights of another run's best checkpoint, on a dataset with other users and items."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..data import RunItems
from ..errors import InputError
from ..fingerprints import changed_settings, file_digest
from ..models import Recommender, trained_rows
from ..setting_fields import to_dict
from .checkpoints import load_weights, named_weights
from .run_folder import RunFolder

LOGGER = logging.getLogger(__name__)
RECORDED_AS = "init"  # the entry of environment.json
ITEM_IDS = "model.item_ids.weight"  # a row for each item that occurs in training
ID_EMBEDDING = "model.item_encoder.embedding.weight"  # of the method id: a row for each item
OF_THE_DATASET = ("contents", "dtype")  # entries of a view's description that may differ


class InitialWeights(NamedTuple):
    """The best checkpoint of a run, with which another run begins."""

    run: Path
    config: RunConfig
    epoch: int  # counted from 1
    digest: str  # sha256 of the checkpoint's file
    tensors: Mapping[str, Tensor]  # on the CPU
    items: RunItems
    views: Mapping[str, dict[str, Any]]  # descriptions by name

    @property
    def record(self) -> dict[str, Any]:
        """Return what the new run records of its beginning, as JSON values."""
        return {"run": str(self.run), "best_epoch": self.epoch, "sha256": self.digest}

    def refuse_other_views(self, views: Mapping[str, dict[str, Any]]) -> None:
        """Raise InputError, naming the setting, if the views of the new run were made otherwise than the run's."""
        if [*views] != [*self.views]:
            there, here = ", ".join(self.views) or "none", ", ".join(views) or "none"
            raise InputError(f"init: {self.run}: views: {there} there, {here} here; give the same views in this order")
        for name, recorded in self.views.items():
            before, now = (_without_contents(view) for view in (recorded, views[name]))
            if changed := changed_settings(before, now):
                raise InputError(f"init: {self.run}: view {name!r}: {'; '.join(changed)}; encode as for that run")

    def load_into(self, model: Recommender, item_ids: Sequence[str], training_counts: np.ndarray) -> None:
        """Copy the weights into the model of a new run.

        Vectors of items go to the items of the same ids, as far as both runs train them; the others stay as they begin
        in a new run. item_ids, training_counts: of the new run, as in RunItems. Raises InputError if the checkpoint
        holds the weights of another model.
        """
        tensors = dict(self.tensors)
        current = named_weights(model)
        tables = [ITEM_IDS, *([ID_EMBEDDING] if self.config.model.method == "id" else [])]
        for name in (name for name in tables if name in current and name in tensors):
            rows_before = _rows(name, self.items.training_counts)
            rows_now = _rows(name, training_counts)
            if tensors[name].shape[:1] != (int(rows_before.max()) + 1,):
                raise InputError(f"init: {self.run}: {name}: expected a vector for each of its items; restore the run")
            pairs = _shared_rows(self.items.item_ids, rows_before, item_ids, rows_now)
            merged = current[name].detach().cpu().clone()
            if tensors[name].shape[1:] == merged.shape[1:]:  # or else refused below
                merged[pairs[:, 1]] = tensors[name][pairs[:, 0]].to(merged.dtype)
            LOGGER.info("%s: the vectors of %s items are taken", self.run, f"{len(pairs):,}")
            tensors[name] = merged
        with _naming_the_setting():
            load_weights(model, tensors, self.run / "best.safetensors")


def read_initial_weights(config: RunConfig) -> InitialWeights | None:
    """Return the best checkpoint that a run begins with; None if it begins with random weights.

    Raises InputError, in one line, if the folder holds no run of a known format, no whole best checkpoint, or the run
    of another model.
    """
    if config.init is None:
        return None
    with _naming_the_setting():
        folder = RunFolder.open(Path(config.init))
        its_config = folder.config
        _refuse_other_model(folder.path, its_config, config)
        if not folder.best.exists():
            raise InputError(f"{folder.path}: no best checkpoint; choose a run with a finished epoch")
        digest = file_digest(folder.best)
        tensors, state = folder.load_best()
        if file_digest(folder.best) != digest:
            raise InputError(f"{folder.best}: was written meanwhile; wait until that training ends")
        return InitialWeights(folder.path, its_config, state["epoch"], digest, tensors, folder.items, folder.views)


def initial_weights_again(folder: RunFolder, config: RunConfig) -> InitialWeights | None:
    """Return the checkpoint with which a run without a checkpoint began. folder: of the run. config: its settings.

    Raises InputError as `read_initial_weights` does, and if the other run's best checkpoint is not the one of then.
    """
    initial = read_initial_weights(config)
    if initial is None:
        return None
    recorded = folder.environment.get(RECORDED_AS)
    if not isinstance(recorded, dict) or recorded.get("sha256") != initial.digest:
        raise InputError(
            f"{folder.path}: {initial.run / 'best.safetensors'} is not the checkpoint with which this run began, and "
            "there is no later one; restore it, or train a new run"
        )
    return initial


def _refuse_other_model(run: Path, before: RunConfig, now: RunConfig) -> None:
    """Raise InputError, naming the setting, if a run has another model than the new one, or histories of another width.

    Settings of the dataset and of the training may differ.
    """
    settings = {f"model.{name}": value for name, value in to_dict(before.model).items()}
    settings["protocol.max_inputs"] = before.protocol.max_inputs
    current = {f"model.{name}": value for name, value in to_dict(now.model).items()}
    current["protocol.max_inputs"] = now.protocol.max_inputs
    for name, value in settings.items():
        if value != current[name]:
            there, here = json.dumps(value), json.dumps(current[name])
            raise InputError(f"{run}: {name}: {there} there, {here} here; give the same, or leave out init")


def _without_contents(view: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a view's description that say how its states were made."""
    return {name: value for name, value in view.items() if name not in OF_THE_DATASET}


def _rows(table: str, training_counts: np.ndarray) -> np.ndarray:
    """Return each item number's row in a table of vectors, int64 [items + 1]; 0 for none."""
    if table == ITEM_IDS:
        return trained_rows(training_counts).numpy()
    return np.arange(len(training_counts))


def _shared_rows(ids_before: Sequence[str], before: np.ndarray, ids_now: Sequence[str], now: np.ndarray) -> Tensor:
    """Return the rows (before, now), int64 [N, 2], of the items that have vectors in both tables."""
    numbers = {item_id: number for number, item_id in enumerate(ids_before, start=1)}
    pairs = [
        (int(before[numbers[item_id]]), int(now[number]))
        for number, item_id in enumerate(ids_now, start=1)
        if item_id in numbers
    ]
    both = [pair for pair in pairs if all(pair)]
    return torch.tensor(both, dtype=torch.int64).view(-1, 2)


@contextmanager
def _naming_the_setting() -> Iterator[None]:
    """Put the setting's name before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"init: {error}") from None
