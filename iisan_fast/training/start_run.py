"""Start a new run: check its settings and data, make its folder, and train it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import NEIGHBOURS, RunConfig
from ..data import Dataset, load_dataset
from ..models import NeighbourTerms
from ..precision import Precision, resolve_precision
from ..ranks import ALONE, Ranks
from ..runtime import fix_cublas_workspace
from .initial_weights import RECORDED_AS, InitialWeights, read_initial_weights
from .item_sources import Descriptions, open_source, refuse_missing_libraries
from .job_agreement import refuse_unfit_job
from .job_runs import JobRunFolder
from .resume_run import resume
from .run_folder import RunFolder
from .run_terms import build_terms, file_of_terms, read_terms
from .scoring import Scoring
from .trainer import Trainer
from .training_loop import TrainingLoop
from .unchanged_dataset import refuse_changed_texts
from .untrained_run import rank_untrained

LOGGER = logging.getLogger(__name__)
NO_TERMS: tuple[NeighbourTerms | None, Descriptions] = (None, {})  # of the ranks after 0, which read rank 0's file


def train(
    config: RunConfig,
    out: Path | RunFolder,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    placement: str = "auto",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train a new run, write it into the folder `out`, and return its test figures.

    out: a path, or a RunFolder; `path` of a numbered one is then the folder really used. A run that a job has begun
    before it was started again goes on. on_epoch: called on rank 0 with each finished epoch's line of metrics.jsonl.
    placement: where the feature table lies, one of config.PLACEMENTS. ranks: the processes that train together. Raises
    InputError for input that cannot be used, if memory does not suffice, or if the loss is not finite. Nothing is
    written before the dataset, the states and the model are loaded.
    """
    fix_cublas_workspace()
    folder = out if isinstance(out, RunFolder) else RunFolder(out, ranks=ranks)
    if isinstance(folder, JobRunFolder) and folder.has_begun:
        ranks.all_do(lambda: folder.refuse_other_settings(config))
        LOGGER.info("%s: goes on, because this job began it before it was started again", folder.path)
        return resume(folder.path, device, on_epoch, placement, ranks=ranks)
    start = ranks.all_do(lambda: _Start.read(config, folder.path, device))
    dataset = start.dataset
    refuse_unfit_job(ranks, config, dataset.sequences, device, placement)
    terms, views = ranks.all_do(lambda: build_terms(config, dataset.sequences) if ranks.is_first else NO_TERMS)
    content = b"" if terms is None else file_of_terms(terms)  # which rank 0 writes
    if config.model.method == NEIGHBOURS:
        with folder:
            folder.begin(config, views, dataset, content, device)
            terms = ranks.all_do(lambda: read_terms(folder) if terms is None else terms)
            return rank_untrained(folder, config, Scoring(dataset.sequences, terms, device, ranks), on_epoch)
    with open_source(config, dataset, device, placement, start.precision, ranks) as (source, views):
        ranks.all_do(lambda: start.refuse_other_views(views))
        trainer = Trainer(config, dataset.sequences, source, device, start.precision, start.initial, ranks)
        ranks.all_do(trainer.refuse_unfit_form)
        with folder:
            began_with = {} if start.initial is None else {RECORDED_AS: start.initial.record}
            folder.begin(trainer.config, views, dataset, content, device, began_with)
            terms = ranks.all_do(lambda: read_terms(folder) if terms is None else terms)
            return TrainingLoop(trainer, folder, terms, on_epoch).run()


class _Start(NamedTuple):
    """The parts of a new run that are read first."""

    precision: Precision
    initial: InitialWeights | None
    dataset: Dataset

    @classmethod
    def read(cls, config: RunConfig, out: Path, device: torch.device) -> _Start:
        """Read the initial weights and the dataset. Raises InputError for what cannot be used."""
        precision = check_new_run(config, out, device)
        initial = read_initial_weights(config)
        dataset = load_dataset(Path(config.dataset), config.protocol)
        refuse_changed_texts(config, dataset)
        return cls(precision, initial, dataset)

    def refuse_other_views(self, views: Descriptions) -> None:
        """Raise InputError if the initial weights are of other views than the run's."""
        if self.initial is not None:
            self.initial.refuse_other_views(views)


def check_new_run(config: RunConfig, out: Path, device: torch.device) -> Precision:
    """Return the precision of a new run in the folder `out`.

    Raises InputError if the folder is in use, if a library is missing, or if the device does not offer the precision.
    Nothing is read or written.
    """
    RunFolder(out).refuse_if_used()
    refuse_missing_libraries(config)
    return resolve_precision(config, device)
