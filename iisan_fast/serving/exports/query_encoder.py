"""Join the sequence encoder and the terms of a score in one module: item vectors of a history in, a query out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models import TERM_CONSTANTS, PlainSequenceEncoder, Recommender
from ..trained_model import TrainedModel

PROFILE_WEIGHTS = TERM_CONSTANTS["profile_weights"]


class QueryEncoder(nn.Module):
    """The state of each user, and the query whose product with an item's joined vector is the score without M."""

    def __init__(self, model: TrainedModel) -> None:
        """Copy what a model computes queries with."""
        super().__init__()
        weights = model.weights
        encoder = model.encoder.model
        self.dimension = model.catalogue.vectors.shape[1]
        self.max_inputs = model.config.protocol.max_inputs
        self.cold_bias = weights.cold_bias
        self.similarity = weights.similarity
        self.start = self.dimension + bool(weights.cold_bias)  # of the coordinates
        self.encoder = (
            PlainSequenceEncoder(encoder.sequence_encoder.weights()) if isinstance(encoder, Recommender) else None
        )

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states [users, d] and the queries [users, D], float32.

        inputs: the joined vectors of the histories' last items, float32 [users, width, D], right-aligned: the last item
        of each history stands last, with zeros before the first one. lengths: of these, int64 [users], from 1.
        """
        if self.encoder is None:
            states = torch.ones_like(inputs[:, 0, : self.dimension])
        else:
            latest = inputs[:, -self.max_inputs :, : self.dimension]
            states = self.encoder(latest, lengths.clamp(max=self.max_inputs))
        parts = [states]
        if self.cold_bias:
            parts.append(torch.full_like(states[:, :1], self.cold_bias))
        if self.similarity:
            parts.append(self.similarity * self._profiles(inputs[:, :, self.start :]))
        return states, torch.cat(parts, dim=1)

    def _profiles(self, coordinates: Tensor) -> Tensor:
        """Return the weighted sums of the last items' coordinates [users, width, dims], scaled to length 1."""
        total = sum(weight * coordinates[:, -1 - age].double() for age, weight in enumerate(PROFILE_WEIGHTS))
        lengths = torch.linalg.vector_norm(total, dim=1, keepdim=True)
        return (total / torch.where(lengths > 0, lengths, torch.ones_like(lengths))).float()


def history_width(model: TrainedModel) -> int:
    """Return how many of a history's last items the query encoder takes."""
    most = model.config.protocol.max_inputs
    return max(most, len(PROFILE_WEIGHTS)) if model.weights.similarity else most
