"""Rank a run's users by a model's scores with neighbour terms, fit the weights of the terms, and rank by baselines."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import EvaluationConfig, ScoringConfig
from ..data import Sequences, Split
from ..errors import InputError
from ..evaluation import evaluate, headline_metrics, popularity_baseline
from ..models import RECENT, NeighbourTerms, Scores, popularity_scores
from ..ranks import ALONE, Ranks
from ..recorded_json import is_finite_number

FIT_K = 10  # of the validation HR@K and NDCG@K by which weights are chosen
# The weights to try, in ascending order: of equally good ones the first is chosen.
COOCCURRENCE_GRID = (0.0, 1.0, 1.5, 2.0, 3.0)
SIMILARITY_GRID = (0.0, 3.0, 6.0, 9.0)


class UserEncoder(Protocol):
    """A model that encodes users by their inputs."""

    def user_states(self, vectors: Tensor, inputs: np.ndarray) -> Tensor:
        """Return the states [users, d] after inputs, int64 [users, max_inputs]. vectors: [items, d]."""


def split_states(model: UserEncoder, vectors: Tensor, split: Split, ranks: Ranks = ALONE) -> Tensor:
    """Return the user state for each target of a split, [R, d]; a user with several targets is encoded once.

    vectors: [items, d] of the catalogue. Each rank has the states of its block of the targets.
    """
    split = split.part(ranks.block(len(split.targets)))
    if split.repeated_users is None:
        return model.user_states(vectors, split.inputs)
    states = model.user_states(vectors, split.inputs[split.first_rows])
    counts = np.diff(split.first_rows, append=len(split.users))
    return states.repeat_interleave(torch.from_numpy(counts).to(states.device), dim=0)


class TermWeights(NamedTuple):
    """The weights of the neighbour terms in a score, and what is added to the score of a cold item."""

    cooccurrence: float = 0.0
    similarity: float = 0.0
    cold_bias: float = 0.0

    @classmethod
    def of(cls, config: ScoringConfig) -> TermWeights:
        """Return the weights of a configuration; 0 for one that is not given."""
        return cls(config.cooccurrence or 0.0, config.similarity or 0.0, config.cold_bias or 0.0)

    @classmethod
    def of_figures(cls, figures: dict[str, Any]) -> TermWeights:
        """Return the weights in the figures on the test set. Raises InputError if they are no weights."""
        stored = figures.get("scoring")
        names = cls._fields
        if (
            not isinstance(stored, dict)
            or stored.keys() != set(names)
            or not all(map(is_finite_number, stored.values()))
        ):
            raise InputError(f"scoring: expected the numbers {', '.join(names)}, found {stored!r}")
        weights = cls(**stored)
        if min(weights.cooccurrence, weights.similarity) < 0:
            raise InputError(f"scoring: expected weights from 0, found {stored!r}")
        return weights


class Scoring:
    """The neighbour terms of a run beside its histories, to rank the users of a split.

    Several ranks share out the targets of a split in blocks: queries are then those of this rank's block, and all ranks
    get the metrics of the whole split.
    """

    def __init__(self, sequences: Sequences, terms: NeighbourTerms, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Take the histories of a run, its terms, the device that ranks, and the processes that rank together."""
        self.sequences = sequences
        self.terms = terms
        self.device = device
        self.ranks = ranks

    def scores(self, queries: Tensor, vectors: Tensor, split: str, weights: TermWeights) -> Scores:
        """Return a model's scores for the targets of a split with the weighted terms.

        queries: user states [R, d], one for each target. vectors: [items, d], item number i in row i - 1, on the same
        device. The bias of items without training interactions takes one dimension more.
        """
        if weights.cold_bias:
            is_cold = torch.from_numpy(self.sequences.training_counts[1:, None] == 0).to(vectors)
            queries = torch.cat([queries, queries.new_full((len(queries), 1), weights.cold_bias)], dim=1)
            vectors = torch.cat([vectors, is_cold], dim=1)
        histories = self._histories(split)
        return self.terms.scored(queries, vectors, histories, weights.cooccurrence, weights.similarity)

    def report(
        self, queries: Tensor, vectors: Tensor, split: str, config: EvaluationConfig, weights: TermWeights
    ) -> dict[str, Any]:
        """Return the metrics of a split by a model's scores with the weighted terms, as `evaluate` does.

        queries, vectors: as in `scores`. Raises InputError if a score is not finite.
        """
        if not any(weights):
            return evaluate(queries, vectors, self.sequences, split, config, ranks=self.ranks)
        return self._evaluated(self.scores(queries, vectors, split, weights), split, config)

    def fitted(self, queries: Tensor, vectors: Tensor, config: EvaluationConfig, cold_bias: float = 0.0) -> TermWeights:
        """Return the weights of the grid with the best HR@10 on the validation set, beside this cold_bias.

        Of equal ones NDCG@10 decides, and then the smaller weights. Without states, similarity stays 0. queries: of the
        validation set, as in `scores`. Raises InputError if there are no validation users.
        """
        if not len(self.sequences.split("validation").targets):
            raise InputError(
                "fit_terms: expected validation users, found none; give cooccurrence and similarity in its place"
            )
        config = replace(config, ks=(FIT_K,))
        similarities = SIMILARITY_GRID if self.terms.similarity is not None else (0.0,)
        best = TermWeights(cold_bias=cold_bias)
        best_figures = (-1.0, -1.0)
        for cooccurrence, similarity in product(COOCCURRENCE_GRID, similarities):
            weights = TermWeights(cooccurrence, similarity, cold_bias)
            figures = headline_metrics(self.report(queries, vectors, "validation", config, weights))
            candidate = (figures[f"hr@{FIT_K}"], figures[f"ndcg@{FIT_K}"])
            if candidate > best_figures:
                best = weights
                best_figures = candidate
        return best

    def baseline_scores(self, split: str) -> dict[str, Scores]:
        """Return the scores for the targets of a split by `popularity` and `neighbours`, rankings without training."""
        counts = self.sequences.training_counts
        histories = self._histories(split)
        popularity = Scores(*popularity_scores(counts, len(histories), self.device), None)
        return {"popularity": popularity, "neighbours": self.terms.baseline(counts, histories, self.device)}

    def baselines(self, split: str, config: EvaluationConfig) -> dict[str, Any]:
        """Return the metrics of `popularity` and of `neighbours`, two rankings without training, on a split.

        "neighbours" also has "similarity": True if the run has states for that term.
        """
        report = self._evaluated(self.baseline_scores(split)["neighbours"], split, config)
        return {
            "popularity": popularity_baseline(self.sequences, split, config, self.ranks),
            "neighbours": {**report, "similarity": self.terms.similarity is not None},
        }

    def _evaluated(self, scores: Scores, split: str, config: EvaluationConfig) -> dict[str, Any]:
        """Return the metrics of a split by scores. Raises InputError if one is not finite."""
        return evaluate(scores.queries, scores.vectors, self.sequences, split, config, scores.added, self.ranks)

    def _histories(self, split: str) -> np.ndarray:
        """Return the latest items before each target of this rank's block, int64 [R, width]."""
        whole = self.sequences.split(split)
        return whole.latest(RECENT, self.ranks.block(len(whole.targets)))
