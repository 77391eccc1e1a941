"""Load the best checkpoint of a finished run from its folder alone, ready to rank items."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..checksums import checksum
from ..config import NEIGHBOURS, EvaluationConfig, RunConfig, ScoringConfig
from ..data import Sequences
from ..errors import InputError
from ..models import NeighbourTerms, Recommender, Scores
from ..ranks import ALONE, Ranks
from ..runtime import fix_cublas_workspace
from .checkpoints import RESTORE, item_vectors, load_weights, without_item_weights
from .run_agreement import refuse_other_runs
from .run_folder import RunFolder
from .run_terms import terms_of_run
from .scoring import Scoring, TermWeights, split_states
from .untrained_run import Popularity


class BestRun(NamedTuple):
    """A run's best checkpoint in memory, and its neighbour terms."""

    config: RunConfig
    sequences: Sequences
    epoch: int  # counted from 1; 0 for the method neighbours
    model: Recommender | Popularity  # without an item encoder, because item_vectors holds its results
    item_vectors: Tensor  # [items, d], item number i in row i - 1
    terms: NeighbourTerms
    weights: TermWeights  # of the terms, by which the run was tested

    @property
    def item_ids(self) -> list[str]:
        """Return the dataset's item ids, in the order of item_vectors."""
        return self.sequences.item_ids

    @property
    def scoring(self) -> Scoring:
        """Return the terms beside the histories, to rank the users of a split."""
        return Scoring(self.sequences, self.terms, self.item_vectors.device)

    def user_states(self, split: str = "test") -> Tensor:
        """Return the state for each target of the split, [R, d]: of its user, after the inputs before the target.

        split: "validation" or "test". The rows are those of `sequences.split(split)`, one for each user unless a given
        split has several targets for some users.
        """
        return split_states(self.model, self.item_vectors, self.sequences.split(split))

    def scores(self, split: str = "test") -> Scores:
        """Return the scores for the targets of a split with the run's terms, one row of `queries` for each target.

        The score of a user and an item is the inner product of their rows in `queries` and `vectors`, and what `added`
        gives for the pair. split: "validation" or "test".
        """
        return self.scoring.scores(self.user_states(split), self.item_vectors, split, self.weights)


def load(path: Path, device: torch.device, similarity: bool = False) -> BestRun:
    """Load the best checkpoint of the run in the folder `path` onto a device.

    The neighbour terms of a run of an earlier version are built from its histories, and from its cache if that can be
    read; similarity: demand the latter. Raises InputError if the folder holds no run, or one without a best checkpoint,
    or a damaged file.
    """
    fix_cublas_workspace()
    folder = RunFolder.open(path)
    config = folder.config
    sequences = folder.sequences
    epoch, model, vectors = best_model(folder, config, sequences.training_counts, device)
    weights = TermWeights.of(config.scoring)
    terms = terms_of_run(folder, config, sequences, similarity or bool(weights.similarity))
    best = BestRun(config, sequences, epoch, model, vectors, terms, weights)
    return best._replace(weights=_fitted_weights(folder, best)) if config.scoring.fit_terms else best


def evaluate_run(
    path: Path,
    split: str,
    evaluation: EvaluationConfig,
    device: torch.device,
    asked: ScoringConfig | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Return the metrics of a run's best checkpoint on a split, and those of the baselines.

    path: the run folder. split: "validation" or "test". asked: weights of the neighbour terms in place of the run's,
    or that they are fitted on the validation set. ranks: the processes that share out the users.

    The metrics of `evaluate` are under the split's name, and under "popularity" and "neighbours", which also has
    "similarity": True if there were states for it. "method", "best_epoch" (counted from 1) and "scoring", the weights,
    describe the run. Raises InputError as `load` does, for a weight of
    similarity in a run without states, and if the ranks have different runs.
    """
    asked = asked or ScoringConfig()
    best = ranks.all_do(lambda: load(path, device, similarity=bool(asked.similarity)))
    if ranks.several:
        histories = checksum(best.sequences.items.data).hex()
        refuse_other_runs(ranks, best, {"split": split, "histories": histories, **asdict(evaluation), **asdict(asked)})
    scoring = Scoring(best.sequences, best.terms, best.item_vectors.device, ranks)

    def states(name: str) -> Tensor:
        return split_states(best.model, best.item_vectors, best.sequences.split(name), ranks)

    chosen = {name: value for name in TermWeights._fields if (value := getattr(asked, name)) is not None}
    weights = best.weights._replace(**chosen)
    if asked.fit_terms:
        weights = scoring.fitted(states("validation"), best.item_vectors, evaluation, weights.cold_bias)
    return {
        "method": best.config.model.method,
        "best_epoch": best.epoch,
        split: scoring.report(states(split), best.item_vectors, split, evaluation, weights),
        **scoring.baselines(split, evaluation),
        "scoring": weights._asdict(),
    }


def best_model(
    folder: RunFolder, config: RunConfig, training_counts: np.ndarray, device: torch.device
) -> tuple[int, Recommender | Popularity, Tensor]:
    """Return the epoch, the model and the item vectors of the best checkpoint, or of the method neighbours.

    training_counts: how often each item number occurs in training, int64 [items + 1]. Raises InputError as `load` does.
    """
    if config.model.method == NEIGHBOURS:
        popularity_model = Popularity(training_counts, device)
        return 0, popularity_model, popularity_model.item_vectors
    tensors, state = folder.load_best()
    popularity = training_counts / training_counts.sum()
    model = Recommender(nn.Identity, config.model, config.protocol.max_inputs, popularity, config.train.seed)
    load_weights(model, without_item_weights(tensors), folder.best)
    vectors = item_vectors(tensors, len(training_counts) - 1, config.model.embedding_dim, folder.best).to(device)
    return state["epoch"], model.to(device).eval(), vectors


def _fitted_weights(folder: RunFolder, best: BestRun) -> TermWeights:
    """Return the weights that a run has chosen by validation, or chooses if it is not tested yet.

    Raises InputError if test.json is damaged.
    """
    if folder.test.exists() and folder.figures["best_epoch"] == best.epoch:
        try:
            return TermWeights.of_figures(folder.figures)
        except InputError as error:
            raise InputError(f"{folder.test}: {error}; {RESTORE}") from None
    cold_bias = TermWeights.of(best.config.scoring).cold_bias
    return best.scoring.fitted(best.user_states("validation"), best.item_vectors, best.config.evaluation, cold_bias)
