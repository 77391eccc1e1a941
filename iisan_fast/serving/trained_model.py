"""Hold a trained run in memory, ready to rank its catalogue for any history."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..models import RECENT, CoOccurrence, NeighbourTerms, Scores, Similarity
from ..training import RankingRun, TermWeights, load_ranking
from .catalogue import Catalogue
from .user_histories import UserHistories


@dataclass(frozen=True)
class TrainedModel:
    """A run's best checkpoint, its catalogue and its neighbour terms."""

    run: Path
    config: RunConfig
    epoch: int  # of the best checkpoint, counted from 1; 0 for the method neighbours
    catalogue: Catalogue
    cooccurrence: CoOccurrence  # of the trained items
    similarity: Similarity | None  # its vectors are the catalogue's coordinates
    weights: TermWeights
    encoder: RankingRun  # gives user states

    @classmethod
    def load(cls, run: Path, device: torch.device) -> TrainedModel:
        """Load the run in a folder onto a device. Raises InputError as `load_ranking` does."""
        ranking = load_ranking(run, device)
        items = ranking.items
        similarity = ranking.terms.similarity
        catalogue = Catalogue(
            item_ids=items.item_ids,
            titles=items.titles,
            training_counts=items.training_counts,
            trained=len(items.item_ids),
            is_removed=np.zeros(len(items.item_ids), dtype=bool),
            vectors=ranking.item_vectors,
            coordinates=None if similarity is None else similarity.vectors,
        )
        terms = ranking.terms
        return cls(
            run, ranking.config, ranking.epoch, catalogue, terms.cooccurrence, similarity, ranking.weights, ranking
        )

    @property
    def device(self) -> torch.device:
        """Return the device that ranks."""
        return self.catalogue.vectors.device

    def with_catalogue(self, catalogue: Catalogue) -> TrainedModel:
        """Return the model with another catalogue, whose trained items are the same."""
        coordinates = catalogue.coordinates
        similarity = self.similarity
        if similarity is not None and coordinates is not None:
            similarity = replace(similarity, vectors=coordinates)
        return replace(self, catalogue=catalogue, similarity=similarity)

    def user_states(self, histories: UserHistories) -> Tensor:
        """Return the states [R, d] after the last items of histories, none of which may be empty."""
        inputs = histories.latest(self.config.protocol.max_inputs)
        return self.encoder.model.user_states(self.catalogue.vectors, inputs)

    def scores(self, histories: UserHistories) -> Scores:
        """Return the scores of histories for all items, removed ones too, with the run's terms."""
        queries = self.user_states(histories)
        vectors = self.catalogue.vectors
        if self.weights.cold_bias:
            is_cold = torch.from_numpy(self.catalogue.training_counts[1:, None] == 0).to(vectors)
            queries = torch.cat([queries, queries.new_full((len(queries), 1), self.weights.cold_bias)], dim=1)
            vectors = torch.cat([vectors, is_cold], dim=1)
        terms = NeighbourTerms(self.cooccurrence, self.similarity)
        weights = self.weights
        return terms.scored(queries, vectors, histories.latest(RECENT), weights.cooccurrence, weights.similarity)
