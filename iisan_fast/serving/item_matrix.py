"""Hold what all items are scored by in one matrix, so that vectors and coordinates are in memory once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..training import TermWeights


class ItemMatrix(NamedTuple):
    """The numbers of all items, item number i in row i - 1. All but the coordinates are views of the first matrix."""

    joined: Tensor  # [items, width]: the vectors, and behind them what the weights of the terms ask for
    vectors: Tensor  # [items, d]
    is_cold: Tensor | None  # [items]: 1 for an item without training interactions; None without a bias
    scored: Tensor | None  # [items, dims]: the coordinates; None with a weight of 0
    coordinates: Tensor | None  # float32 [items, dims], on the host: `scored` if that is there; None without states

    @classmethod
    def empty(cls, items: int, d: int, dims: int | None, weights: TermWeights, device: torch.device) -> ItemMatrix:
        """Make room for items, into whose vectors and coordinates the caller writes before `complete`.

        dims: of the coordinates; None for a run without states. weights: of the run's terms.
        """
        start = d + bool(weights.cold_bias)
        width = start + ((dims or 0) if weights.similarity else 0)
        joined = torch.empty(items, width, device=device)
        scored = joined[:, start:] if width > start else None
        if dims is None:
            coordinates = None
        else:
            coordinates = scored if scored is not None and scored.is_cpu else torch.empty(items, dims)
        return cls(joined, joined[:, :d], joined[:, d] if weights.cold_bias else None, scored, coordinates)

    @classmethod
    def of(
        cls, vectors: Tensor, coordinates: Tensor | None, training_counts: np.ndarray, weights: TermWeights
    ) -> ItemMatrix:
        """Join vectors [items, d], on their device, and coordinates [items, dims].

        training_counts: of each item number, int64 [items + 1].
        """
        items, d = vectors.shape
        dims = None if coordinates is None else coordinates.shape[1]
        matrix = cls.empty(items, d, dims, weights, vectors.device)
        matrix.vectors.copy_(vectors)
        if coordinates is not None and matrix.coordinates is not None:
            matrix.coordinates.copy_(coordinates)
        matrix.complete(training_counts)
        return matrix

    def complete(self, training_counts: np.ndarray) -> None:
        """Write what follows from the coordinates and the counts. training_counts: as `of` takes them."""
        if self.is_cold is not None:
            self.is_cold.copy_(torch.from_numpy(training_counts[1:] == 0))
        if self.scored is not None and self.coordinates is not None and self.scored is not self.coordinates:
            self.scored.copy_(self.coordinates)
