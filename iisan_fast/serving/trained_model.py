"""Hold a trained run in memory, ready to rank its catalogue for any history."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..models import RECENT, CoOccurrence, NeighbourTerms, Scores, Similarity
from ..training import RankingRun, RunFolder, TermWeights, copy_coordinates, load_ranking
from .growing.catalogue import Catalogue
from .growing.catalogue_file import changed_catalogue
from .histories.user_histories import UserHistories
from .item_matrix import ItemMatrix


@dataclass(frozen=True)
class TrainedModel:
    """A run's best checkpoint, its catalogue and its neighbour terms."""

    run: Path
    config: RunConfig
    epoch: int  # of the best checkpoint, counted from 1; 0 for the method neighbours
    catalogue: Catalogue  # its vectors and coordinates are views of `joined`
    joined: Tensor  # [items, width]: what the queries of `scores` multiply
    cooccurrence: CoOccurrence  # of the trained items
    similarity: Similarity | None  # its vectors are the catalogue's coordinates
    weights: TermWeights
    encoder: RankingRun  # gives user states

    @classmethod
    def load(cls, run: Path, device: torch.device, changed: bool = True) -> TrainedModel:
        """Load the run in a folder onto a device. Raises InputError as `load_ranking` and `changed_catalogue` do.

        changed: take the catalogue of now; False takes that of the training. Vectors and coordinates are in memory
        once: a large catalogue takes little more than both.
        """
        ranking = load_ranking(run, device)
        items = ranking.items
        similarity = ranking.terms.similarity
        dims = None if similarity is None else similarity.vectors.shape[1]
        count, d = ranking.item_vectors.shape
        matrix = ItemMatrix.empty(count, d, dims, ranking.weights, device)
        matrix.vectors.copy_(ranking.item_vectors)
        ranking = ranking._replace(item_vectors=matrix.vectors)
        if similarity is not None and matrix.coordinates is not None:
            copy_coordinates(RunFolder(run), similarity, matrix.coordinates)
        matrix.complete(items.training_counts)
        catalogue = Catalogue(
            item_ids=items.item_ids,
            titles=items.titles,
            training_counts=items.training_counts,
            trained=len(items.item_ids),
            is_removed=np.zeros(len(items.item_ids), dtype=bool),
            vectors=matrix.vectors,
            coordinates=matrix.coordinates,
        )
        model = cls(
            run=run,
            config=ranking.config,
            epoch=ranking.epoch,
            catalogue=catalogue,
            joined=matrix.joined,
            cooccurrence=ranking.terms.cooccurrence,
            similarity=_with_vectors(similarity, matrix.coordinates),
            weights=ranking.weights,
            encoder=_without_terms(ranking),
        )
        return model.with_catalogue(changed_catalogue(run, ranking.epoch, catalogue)) if changed else model

    @property
    def device(self) -> torch.device:
        """Return the device that ranks."""
        return self.joined.device

    def with_catalogue(self, catalogue: Catalogue) -> TrainedModel:
        """Return the model with another catalogue, whose trained items are the same."""
        before = self.catalogue
        if catalogue.vectors is before.vectors and catalogue.coordinates is before.coordinates:
            return replace(self, catalogue=catalogue)
        matrix = ItemMatrix.of(catalogue.vectors, catalogue.coordinates, catalogue.training_counts, self.weights)
        return replace(
            self,
            catalogue=replace(catalogue, vectors=matrix.vectors, coordinates=matrix.coordinates),
            joined=matrix.joined,
            similarity=_with_vectors(self.similarity, matrix.coordinates),
            encoder=self.encoder._replace(item_vectors=matrix.vectors),
        )

    def user_states(self, histories: UserHistories) -> Tensor:
        """Return the states [R, d] after the last items of histories, none of which may be empty."""
        inputs = histories.latest(self.config.protocol.max_inputs)
        return self.encoder.model.user_states(self.catalogue.vectors, inputs)

    def scores(self, histories: UserHistories) -> Scores:
        """Return the scores of histories for all items, removed ones too, with the run's terms."""
        queries = self.user_states(histories)
        weights = self.weights
        if weights.cold_bias:
            queries = torch.cat([queries, queries.new_full((len(queries), 1), weights.cold_bias)], dim=1)
        terms = NeighbourTerms(self.cooccurrence, self.similarity)
        recent = histories.latest(RECENT)
        return terms.scored_by_joined(queries, self.joined, recent, weights.cooccurrence, weights.similarity)


def _with_vectors(similarity: Similarity | None, coordinates: Tensor | None) -> Similarity | None:
    """Return the map from states to coordinates with the coordinates of a catalogue; None for a run without states."""
    return None if similarity is None or coordinates is None else replace(similarity, vectors=coordinates)


def _without_terms(ranking: RankingRun) -> RankingRun:
    """Return a run whose terms hold no coordinates, because the catalogue does."""
    return ranking._replace(terms=replace(ranking.terms, similarity=None))
