"""Carry out a run without training: popularity in place of a model, and the neighbour terms beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..models import popularity_scores
from .run_folder import RunFolder
from .run_progress import SELECTED_BY
from .scoring import Scoring, TermWeights, split_states


class Popularity:
    """The stand-in for a model in a run without training: every user has the state 1, and an item one number."""

    def __init__(self, training_counts: np.ndarray, device: torch.device) -> None:
        """Take how often each item number occurs in training, int64 [items + 1]."""
        _, self.item_vectors = popularity_scores(training_counts, 0, device)

    def user_states(self, vectors: Tensor, inputs: np.ndarray) -> Tensor:
        """Return ones [users, 1] on the device of the item vectors. inputs: of the users, [users, width]."""
        return torch.ones(len(inputs), 1, device=vectors.device)


def rank_untrained(
    folder: RunFolder, config: RunConfig, scoring: Scoring, on_epoch: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Rank the users of both splits, write metrics.jsonl and test.json, and return the test figures.

    on_epoch: gets the line of metrics.jsonl, which has epoch 0, validation figures and their seconds. Raises InputError
    if weights are to be fitted and there are no validation users.
    """
    sequences = scoring.sequences
    model = Popularity(sequences.training_counts, scoring.device)
    vectors = model.item_vectors
    validation, test = (
        split_states(model, vectors, sequences.split(name), scoring.ranks) for name in ("validation", "test")
    )
    evaluation = config.evaluation
    started = time.perf_counter()
    weights = TermWeights.of(config.scoring)
    if config.scoring.fit_terms:
        weights = scoring.fitted(validation, vectors, evaluation, weights.cold_bias)
    with_selection = replace(evaluation, ks=tuple(sorted({*evaluation.ks, SELECTED_BY})))
    report = scoring.report(validation, vectors, "validation", with_selection, weights)
    line = {"epoch": 0, "best": True, "validation_seconds": time.perf_counter() - started, "validation": report}
    folder.write_metrics([line])
    if scoring.ranks.is_first:
        on_epoch(line)
    result = {
        "method": config.model.method,
        "best_epoch": 0,
        "epochs": 0,
        "trainable_parameters": 0,
        "validation": report,
        "test": scoring.report(test, vectors, "test", evaluation, weights),
        **scoring.baselines("test", evaluation),
        "scoring": weights._asdict(),
    }
    folder.write_test(result)
    return result
