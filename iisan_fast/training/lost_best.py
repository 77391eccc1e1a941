"""Find out as a run goes on whether its best checkpoint is whole, and make a damaged one again if that is possible.

Otherwise the run would fail at its end, after hours, when the best checkpoint is tested.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import InputError
from ..models import Recommender
from ..ranks import ALONE, Ranks
from ..states import ItemSource
from .checkpoints import best_tensors, item_vectors, load_checkpoint, load_weights, weights_to_keep
from .determinism import deterministic
from .run_folder import RunFolder
from .run_progress import Progress

LOGGER = logging.getLogger(__name__)


def refuse_lost_best(
    folder: RunFolder,
    progress: Progress,
    model: Recommender,
    source: ItemSource,
    shape: tuple[int, int],
    steps_per_epoch: int,
    ranks: Ranks = ALONE,
) -> None:
    """Make the best checkpoint again if it cannot be used, and the last or previous one holds the weights of its epoch.

    progress: that of the run. model: its weights are changed. shape: of the item vectors. ranks: those that go on with
    the run. Raises InputError if no checkpoint holds the weights.
    """
    if progress.best_epoch == 0:
        return
    problem = ranks.first_does(lambda: _problem(folder, progress, model, shape))
    if problem is None:
        return
    path = ranks.first_does(lambda: _stand_in(folder, progress, steps_per_epoch))
    if path is None:
        raise InputError(f"{problem}; no other checkpoint holds the weights of epoch {progress.best_epoch}")
    LOGGER.warning("%s; it is made again from %s", problem, path.name)
    ranks.all_do(lambda: load_weights(model, weights_to_keep(load_checkpoint(path)[0]), path))
    model.eval()
    with deterministic():
        vectors = model.catalogue_vectors(source, ranks)
    folder.save_best(best_tensors(model, vectors, source), {"epoch": progress.best_epoch})


def _stand_in(folder: RunFolder, progress: Progress, steps_per_epoch: int) -> Path | None:
    """Return a whole checkpoint that holds the weights of a run's best epoch; None if there is none."""
    for path in (folder.last, folder.previous):
        try:
            its_progress = Progress.of(load_checkpoint(path)[1], path)
        except InputError:  # missing, or damaged too
            continue
        if _epoch_of_weights(its_progress, steps_per_epoch) == progress.best_epoch:
            return path
    return None


def _problem(folder: RunFolder, progress: Progress, model: Recommender, shape: tuple[int, int]) -> str | None:
    """Return why the best checkpoint cannot be used; None if it can."""
    try:
        tensors, state = folder.load_best()
        load_weights(model, tensors, folder.best)
        item_vectors(tensors, *shape, folder.best)
    except InputError as error:
        return str(error)
    # A run that was killed before it wrote the last checkpoint has a best one of a later epoch, and writes it again.
    if state["epoch"] == progress.best_epoch or state["epoch"] > progress.epoch:
        return None
    return f"{folder.best}: expected the best epoch, {progress.best_epoch}, found epoch {state['epoch']}"


def _epoch_of_weights(progress: Progress, steps_per_epoch: int) -> int | None:
    """Return the epoch, counted from 1, after which a checkpoint's weights stand; None within an epoch."""
    steps = progress.under_way.steps
    if steps == 0:
        return progress.epoch
    return progress.epoch + 1 if steps == steps_per_epoch else None
