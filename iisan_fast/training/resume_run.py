"""Go on with a run: after a stop, for more epochs, or with its data and encoders in other places."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import NEIGHBOURS, RunConfig, TrainConfig
from ..data import Dataset, Sequences
from ..errors import InputError
from ..precision import Precision, resolve_precision
from ..ranks import ALONE, Ranks
from ..runtime import fix_cublas_workspace
from ..states import ItemSource
from .initial_weights import initial_weights_again
from .item_sources import open_final_states, open_source, refuse_changed_views
from .job_agreement import refuse_unfit_job
from .run_changes import NO_CHANGES, RunChanges
from .run_environment import recorded_ranks
from .run_folder import RunFolder
from .run_progress import Progress
from .run_terms import damage_of_terms, read_terms, terms_again
from .scoring import Scoring
from .trainer import Trainer
from .training_loop import TrainingLoop
from .unchanged_dataset import dataset_again, same_dataset
from .untrained_run import rank_untrained

LOGGER = logging.getLogger(__name__)


def resume(
    out: Path,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    placement: str = "auto",
    changes: RunChanges = NO_CHANGES,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Continue a run, with the results that it would have had without the stop, and return its test figures.

    A finished run returns its stored figures, unless the changes let it go on. on_epoch, placement: as in `train`.
    changes: replace settings in config.json, once all is checked. ranks: the processes that train together, which may
    be others than before; the figures then differ in rounding. Raises InputError if `out` holds no run, or if the
    run's dataset, states, encoders or checkpoint have changed or are missing, or if a run with these settings would
    have ended before or had other learning rates; nothing is written in these cases. Raises Stopped after a signal,
    when the run is saved.
    """
    fix_cublas_workspace()
    folder = ranks.all_do(lambda: RunFolder.open(out, ranks=ranks))
    if not changes and (figures := ranks.first_does(lambda: _finished(folder))) is not None:
        return figures
    config = ranks.all_do(lambda: changes.applied_to(folder.config))
    folder.mention_changed_settings()
    ranks.all_do(lambda: _refuse_other_ranks(folder, config.train, ranks))
    precision = ranks.all_do(lambda: _precision_again(folder, device))
    with folder.hold():
        dataset = ranks.all_do(lambda: _dataset(folder, config, moved=changes.dataset is not None))
        refuse_unfit_job(ranks, config, dataset.sequences, device, placement)
        # Rank 0 alone makes the terms again, and writes them.
        new_terms = ranks.all_do(lambda: terms_again(folder, config, dataset.sequences) if ranks.is_first else None)
        if config.model.method == NEIGHBOURS:
            ranks.all_do(lambda: _refuse_moved_states(folder, config, dataset, changes))
            if changes:
                folder.change_config(config)
            return _rank_again(folder, config, dataset.sequences, new_terms, device, on_epoch, ranks)
        with open_source(config, dataset, device, placement, precision, ranks) as (source, views):
            ranks.all_do(lambda: refuse_changed_views(folder.views, views, folder.path))
            again = _TrainerAgain(folder, config, changes, ranks)
            trainer, figures = again.made(dataset.sequences, source, precision, device)
            folder.remove_leftovers()
            folder.write_neighbours(new_terms)
            if figures is not None:
                return figures
            _mention_other_rounding(folder, device, ranks)
            if again.restored:  # a run may have been killed after it wrote the checkpoint and before the metrics
                folder.write_metrics(trainer.progress.lines)
            terms = ranks.all_do(lambda: read_terms(folder))
            return TrainingLoop(trainer, folder, terms, on_epoch).run()


class _TrainerAgain:
    """Make the trainer of a run again, from its last checkpoint if there is one."""

    def __init__(self, folder: RunFolder, config: RunConfig, changes: RunChanges, ranks: Ranks) -> None:
        """Take the run. config: with the changes."""
        self.folder = folder
        self.config = config
        self.changes = changes
        self.ranks = ranks
        self.restored = False

    def made(
        self, sequences: Sequences, source: ItemSource, precision: Precision, device: torch.device
    ) -> tuple[Trainer, dict[str, Any] | None]:
        """Return the trainer where the run goes on, and the test figures if it is finished. Writes the changes.

        Raises InputError if the checkpoint cannot be used, or does not fit the changes.
        """
        folder = self.folder
        ranks = self.ranks
        figures = ranks.first_does(lambda: _final_figures(folder, self.config))
        self.restored = ranks.from_first(folder.has_checkpoint or (figures is None and folder.metrics.exists()))
        begins = figures is None and not self.restored
        initial = ranks.all_do(lambda: initial_weights_again(folder, self.config) if begins else None)
        trainer = Trainer(self.config, sequences, source, device, precision, initial, ranks)
        train = self.config.train
        if self.restored:
            trainer.restore(folder)
            _refuse_other_schedule(folder, train, trainer.progress)
            _refuse_earlier_end(folder, train, trainer.progress)
        if self.changes:
            folder.change_config(trainer.config)
        if self.changes.max_epochs is not None and trainer.progress.finished(train):
            _mention_early_stop(folder, train, trainer.progress)
        return trainer, figures


def _finished(folder: RunFolder) -> dict[str, Any] | None:
    """Return the figures of a finished run, after repairs by this rank alone; None if it goes on.

    Raises InputError if it is damaged.
    """
    figures = _final_figures(folder, folder.config)
    if figures is not None:
        LOGGER.info("%s is finished already", folder.path)
        alone = RunFolder(folder.path)
        if damage_of_terms(folder):
            _write_terms_again(alone)
        alone.remove_leftovers()
    return figures


def _refuse_other_ranks(folder: RunFolder, train: TrainConfig, ranks: Ranks) -> None:
    """Raise InputError if another number of ranks would change the loss of a run with local negatives."""
    before = recorded_ranks(folder.environment)
    if train.negatives == "local" and ranks.count != before:
        raise InputError(
            f"{folder.path}: negatives local: a rank's own users give its negatives, so the run goes on with {before} "
            f"ranks, as it began; found {ranks.count}; start {before}"
        )


def _refuse_moved_states(folder: RunFolder, config: RunConfig, dataset: Dataset, changes: RunChanges) -> None:
    """Raise InputError if the changes name places of states, and these hold others than before."""
    if changes.cache is not None or changes.features:
        with open_final_states(config, dataset.sequences.item_ids) as (_, views):
            refuse_changed_views(folder.views, views, folder.path)


def _write_terms_again(folder: RunFolder) -> None:
    """Make the damaged neighbour terms of a finished run again. Raises InputError if its cache has changed since."""
    with folder.hold():
        folder.write_neighbours(terms_again(folder, folder.config, folder.sequences))


def _rank_again(
    folder: RunFolder,
    config: RunConfig,
    sequences: Sequences,
    new_terms: bytes | None,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None],
    ranks: Ranks,
) -> dict[str, Any]:
    """Return the figures of a run without training; rank again if they are missing or damaged.

    new_terms: on rank 0 the content of neighbours.safetensors, if it has to be written again.
    """
    folder.remove_leftovers()
    folder.write_neighbours(new_terms)
    if (figures := ranks.first_does(lambda: _final_figures(folder, config))) is not None:
        return figures
    terms = ranks.all_do(lambda: read_terms(folder))
    return rank_untrained(folder, config, Scoring(sequences, terms, device, ranks), on_epoch)


def _final_figures(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """Return the stored test figures if the run ends with the epoch that they are of; None if it goes on."""
    figures = folder.read_test()
    if figures is None or config.model.method == NEIGHBOURS:
        return figures
    return figures if Progress(figures["epochs"], figures["best_epoch"]).finished(config.train) else None


def _dataset(folder: RunFolder, config: RunConfig, moved: bool) -> Dataset:
    """Return the run's dataset. Raises InputError if its place holds another one."""
    if moved:
        return same_dataset(config, folder.sequences)
    return dataset_again(config, folder.sequences)


def _refuse_earlier_end(folder: RunFolder, config: TrainConfig, progress: Progress) -> None:
    """Raise InputError if a run with these settings would have ended before the place that the run has reached."""
    end = progress.last_epoch(config)
    if end is not None and (end < progress.epoch or progress.under_way.steps):
        raise InputError(
            f"{folder.path}: with max_epochs {config.max_epochs} and patience {config.patience} a run ends with epoch "
            f"{end}, but {progress.place} is done; give more epochs or patience, or train a new run"
        )


def _refuse_other_schedule(folder: RunFolder, config: TrainConfig, progress: Progress) -> None:
    """Raise InputError if steps were taken on a schedule that would have ended with another epoch."""
    before = folder.config.train.max_epochs
    if config.schedule != "constant" and config.max_epochs != before and progress.place:
        raise InputError(
            f"{folder.path}: max_epochs: the {config.schedule} schedule under way brings the learning rates to 0 after "
            f"{before} epochs, found {config.max_epochs}; leave it out, or train a new run"
        )


def _mention_early_stop(folder: RunFolder, config: TrainConfig, progress: Progress) -> None:
    """Log that patience has ended a run whose epochs would go on."""
    if progress.epoch < config.max_epochs:
        LOGGER.warning(
            "%s: ended after epoch %d, since more than %d epochs brought no better validation; "
            "to go on, give more patience too",
            folder.path,
            progress.epoch,
            config.patience,
        )


def _mention_other_rounding(folder: RunFolder, device: torch.device, ranks: Ranks) -> None:
    """Log what has changed since the run began and rounds differently."""
    if differences := folder.other_rounding(device, ranks.count):
        LOGGER.warning(
            "%s: %s; results will differ in rounding from those of a run that was not stopped",
            folder.path,
            "; ".join(differences),
        )


def _precision_again(folder: RunFolder, device: torch.device) -> Precision:
    """Return the precision of a resumed run. Raises InputError, naming the folder, if the device does not offer it."""
    try:
        return resolve_precision(folder.config, device)
    except InputError as error:
        raise InputError(f"{folder.path}: {error}") from None
