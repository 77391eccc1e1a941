"""Start a new run: check its settings and data, make its folder, and train it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import NEIGHBOURS, RunConfig
from ..data import load_dataset
from ..precision import Precision, resolve_precision
from ..ranks import ALONE, Ranks, refuse_disagreement, refuse_too_few
from ..runtime import fix_cublas_workspace
from ..setting_fields import to_dict
from .initial_weights import RECORDED_AS, read_initial_weights
from .item_sources import open_source, refuse_missing_libraries
from .run_folder import RunFolder
from .run_terms import build_terms, file_of_terms
from .scoring import Scoring
from .trainer import Trainer
from .training_loop import TrainingLoop
from .unchanged_dataset import refuse_changed_texts
from .untrained_run import rank_untrained


def train(
    config: RunConfig,
    out: Path | RunFolder,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    placement: str = "auto",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train a new run, write it into the folder `out`, and return its test figures.

    out: a path, or a RunFolder; `path` of a numbered one is then the folder really used. on_epoch: called with each
    finished epoch's line of metrics.jsonl. placement: where the feature table lies, one of config.PLACEMENTS.
    ranks: the processes that train together. Raises InputError for input that cannot be used, if memory does not
    suffice, or if the loss is not finite. Nothing is written before the dataset, the states and the model are loaded.
    """
    fix_cublas_workspace()
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    precision = check_new_run(config, folder.path, device)
    initial = read_initial_weights(config)
    dataset = load_dataset(Path(config.dataset), config.protocol)
    refuse_too_few(ranks, len(dataset.sequences.training_users), "training users")
    refuse_too_few(ranks, len(dataset.sequences.item_ids), "items")
    refuse_disagreement(ranks, {**to_dict(config.model), **to_dict(config.train), "device": device.type})
    refuse_changed_texts(config, dataset)
    terms, views = build_terms(config, dataset.sequences)
    if config.model.method == NEIGHBOURS:
        with folder:
            folder.begin(config, views, dataset, file_of_terms(terms), device)
            return rank_untrained(folder, config, Scoring(dataset.sequences, terms, device, ranks), on_epoch)
    with open_source(config, dataset, device, placement, precision, ranks) as (source, views):
        if initial is not None:
            initial.refuse_other_views(views)
        trainer = Trainer(config, dataset.sequences, source, device, precision, initial, ranks)
        trainer.refuse_unfit_form()
        with folder:
            began_with = {} if initial is None else {RECORDED_AS: initial.record}
            folder.begin(trainer.config, views, dataset, file_of_terms(terms), device, began_with)
            return TrainingLoop(trainer, folder, terms, on_epoch).run()


def check_new_run(config: RunConfig, out: Path, device: torch.device) -> Precision:
    """Return the precision of a new run in the folder `out`.

    Raises InputError if the folder is in use, if a library is missing, or if the device does not offer the precision.
    Nothing is read or written.
    """
    RunFolder(out).refuse_if_used()
    refuse_missing_libraries(config)
    return resolve_precision(config, device)
