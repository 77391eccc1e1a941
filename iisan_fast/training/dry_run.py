"""Describe a new run without training it: what would be trained, its memory, and the files that it would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..config import FEATURES, NEIGHBOURS, RunConfig
from ..data import Dataset, load_dataset
from ..evaluation import parameter_counts
from ..ranks import ALONE, Ranks
from ..runtime import fix_cublas_workspace
from ..setting_fields import to_dict
from .initial_weights import read_initial_weights
from .item_sources import Descriptions, open_final_states, open_unread_source
from .run_files import CATALOGUE_FILE, CHECKPOINTS, RUN_FILES
from .start_run import check_new_run
from .trainer import Trainer
from .unchanged_dataset import refuse_changed_texts

ADAM_MOMENTS = 2  # that Adam stores of each trained parameter
NOT_ESTIMATED = "not estimated"


def describe_new_run(
    config: RunConfig, out: Path, device: torch.device, placement: str = "auto", ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Do all checks of a new run in the folder `out`, and describe it as JSON values. Nothing is written.

    The model is built and encoders are loaded, but a cache's states are not read. Returns

    - method, device, views: source, encoder, layers and width of each
    - users, items, steps_per_epoch, max_epochs
    - parameters: trainable and total numbers, and the trainable ones of each group
    - memory, in bytes: the table and its place, the parameters, gradients and Adam's moments, and the largest batch by
      estimate; "not estimated" for what is not known
    - init: the run with whose weights training begins, and its best epoch; None for random weights
    - files: the run's folder, the files that it will hold, and what is read
    - config: the settings, as config.json will hold them

    ranks: those that would train; all call it, and memory is that of one. Raises InputError as `train` does before it
    writes.
    """
    fix_cublas_workspace()
    precision = check_new_run(config, out, device)
    initial = read_initial_weights(config)
    dataset = load_dataset(Path(config.dataset), config.protocol)
    refuse_changed_texts(config, dataset)
    if config.model.method == NEIGHBOURS:
        return _describe_untrained(config, dataset, out, device)
    with open_unread_source(config, dataset, device, placement, precision) as (source, views, (size, place)):
        if initial is not None:
            initial.refuse_other_views(views)
        trainer = Trainer(config, dataset.sequences, source, device, precision, initial, ranks)
        trainer.refuse_unfit_form()
        return {
            "method": config.model.method,
            "device": str(device),
            "views": {name: _described_view(view) for name, view in views.items()},
            **_amounts(trainer, dataset),
            "parameters": _parameters(trainer),
            "memory": {"table": size, "table_place": place if size else "none", **_memory(trainer)},
            "init": None if initial is None else {"run": str(initial.run), "best_epoch": initial.epoch},
            "files": _files(config, out, views),
            "config": _config(trainer.config),
        }


def _describe_untrained(config: RunConfig, dataset: Dataset, out: Path, device: torch.device) -> dict[str, Any]:
    """Describe a run without training, as `describe_new_run` does. Raises InputError if its cache lacks states."""
    views: Descriptions = {}
    if config.has_states:
        with open_final_states(config, dataset.sequences.item_ids) as (_, views):
            pass
    return {
        "method": config.model.method,
        "device": str(device),
        "views": {name: _described_view(view) for name, view in views.items()},
        "users": len(dataset.sequences.user_ids),
        "items": len(dataset.sequences.item_ids),
        "steps_per_epoch": 0,
        "max_epochs": 0,
        "parameters": {"trainable": 0, "total": 0, "groups": {}},
        "memory": {"table": 0, "table_place": "none", "parameters": 0, "gradients": 0, "optimizer": 0, "batch": 0},
        "init": None,
        "files": _files(config, out, views),
        "config": _config(config),
    }


def _config(config: RunConfig) -> dict[str, Any]:
    """Return the settings as config.json holds them, with lists in place of tuples."""
    return json.loads(json.dumps(to_dict(config)))


def _described_view(view: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a view that the description shows."""
    place = {"path": view["path"]} if view["source"] == FEATURES else {"encoder": view.get("encoder")}
    return {"source": view["source"], **place, **{name: view.get(name) for name in ("pooling", "layers", "width")}}


def _amounts(trainer: Trainer, dataset: Dataset) -> dict[str, int]:
    """Return the numbers of users, items, steps and epochs."""
    return {
        "users": len(dataset.sequences.user_ids),
        "items": len(dataset.sequences.item_ids),
        "steps_per_epoch": trainer.steps_per_epoch,
        "max_epochs": trainer.config.train.max_epochs,
    }


def _parameters(trainer: Trainer) -> dict[str, Any]:
    """Return the numbers of trainable and of all parameters, and of the trainable ones in each group."""
    groups = trainer.model.parameter_groups()
    counts = {name: sum(weight.numel() for weight in weights) for name, weights in groups.items()}
    return {**parameter_counts(trainer.model), "groups": counts}


def _memory(trainer: Trainer) -> dict[str, Any]:
    """Return the bytes of parameters, gradients, Adam's moments with averaged weights, and the largest batch."""
    weights = list(trainer.model.parameters())
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    averaged = trainer.config.train.ema_decay > 0
    no_states = trainer.config.model.method == "id"  # its batches hold item numbers, which the budget does not count
    return {
        "parameters": sum(weight.nbytes for weight in weights),
        "gradients": trained,
        "optimizer": (ADAM_MOMENTS + averaged) * trained,
        "batch": NOT_ESTIMATED if no_states else trainer.memory.estimate,
    }


def _files(config: RunConfig, out: Path, views: Descriptions) -> dict[str, Any]:
    """Return the run's folder, the files that the run writes, and the folders that it reads."""
    encoders = [] if config.uncached is None else [view["encoder"] for view in views.values()]
    folders = [folder for folder in (config.cache, config.init) if folder is not None]
    features = [file for view in config.features for file in (view.path, view.ids) if file is not None]
    sources = [config.dataset, *folders, *features, *dict.fromkeys(encoders)]
    absent = {CATALOGUE_FILE, *(CHECKPOINTS if config.model.method == NEIGHBOURS else ())}
    written = [name for name in RUN_FILES if name not in absent]
    return {"folder": str(out), "written": written, "read": sources}
