"""Load what ranking needs of a run: its items, its best model and its terms. The histories are not needed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import RunConfig
from ..data import RunItems
from ..errors import InputError
from ..models import NeighbourTerms, Recommender
from ..runtime import fix_cublas_workspace
from .best_run import best_model, load
from .run_folder import RunFolder
from .run_terms import read_terms
from .scoring import TermWeights
from .untrained_run import Popularity


class RankingRun(NamedTuple):
    """A run's best checkpoint in memory, with its items and its neighbour terms."""

    config: RunConfig
    items: RunItems
    epoch: int  # counted from 1; 0 for the method neighbours
    model: Recommender | Popularity  # without an item encoder, because item_vectors holds its results
    item_vectors: Tensor  # [items, d], item number i in row i - 1
    terms: NeighbourTerms
    weights: TermWeights  # of the terms, by which the run was tested


def load_ranking(path: Path, device: torch.device) -> RankingRun:
    """Load the best checkpoint of the run in the folder `path` onto a device, ready to rank histories.

    A published run needs no histories. Raises InputError if the folder holds no run, or one without a best checkpoint,
    or a damaged file.
    """
    fix_cublas_workspace()
    folder = RunFolder.open(path)
    items = folder.items
    if folder.has_histories:
        best = load(path, device)
        return RankingRun(best.config, items, best.epoch, best.model, best.item_vectors, best.terms, best.weights)
    config = folder.config
    epoch, model, vectors = best_model(folder, config, items.training_counts, device)
    terms = read_terms(folder)
    if len(terms.cooccurrence.offsets) - 1 != len(items.item_ids):
        raise InputError(f"{folder.neighbours}: expected the terms of {len(items.item_ids)} items, found others")
    weights = TermWeights.of_figures(folder.figures) if config.scoring.fit_terms else TermWeights.of(config.scoring)
    return RankingRun(config, items, epoch, model, vectors, terms, weights)
