"""Add two terms to the scores of any model, without training: co-occurrence and similarity of content.

For a user with history h_1 … h_n, newest last, and an item v:

    score = q · e_v + lambda log(1 + 20 M[u, v]) + mu c_u · x_v

M is `CoOccurrence.sums`, c_u is `Similarity.profiles`, x_v is `Similarity.vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import NEIGHBOUR_WEIGHTS
from ..kernels import AddedScores
from .cooccurrence import DECAY, RECENT, CoOccurrence
from .similarity import PROFILE_WEIGHTS, Similarity

SUMS_FACTOR = 20.0  # in log(1 + 20 M)
POPULARITY_WEIGHT = 0.3  # of the log of an item's training count, in place of a model's score
LEAST_COUNT = 0.5  # of an item that does not occur in training
TERM_CONSTANTS = {  # of the formulas, for programs that score by exported tables
    "recent": RECENT,
    "decay": DECAY,
    "sums_factor": SUMS_FACTOR,
    "profile_weights": PROFILE_WEIGHTS,
    "popularity_weight": POPULARITY_WEIGHT,
    "least_count": LEAST_COUNT,
}

COOCCURRENCE_DTYPES = {"offsets": torch.int64, "items": torch.int32, "values": torch.float32}
SIMILARITY_NAMES = ("vectors", "mean", "scale", "basis")


class Scores(NamedTuple):
    """The scores of R users for all items: dot products, and what is added to those of a few items."""

    queries: Tensor  # [R, d]
    vectors: Tensor  # [items, d], item number i in row i - 1
    added: Callable[[np.ndarray], AddedScores] | None  # takes rows of the queries, int64; None if nothing is added


@dataclass(frozen=True)
class NeighbourTerms:
    """Both terms of a catalogue. Without `similarity` there are no states, and its weight must be 0."""

    cooccurrence: CoOccurrence
    similarity: Similarity | None

    def scored(
        self, queries: Tensor, vectors: Tensor, histories: np.ndarray, cooccurrence: float, similarity: float
    ) -> Scores:
        """Add the terms to the scores of a model. With both weights 0 the model's tensors are returned as they are.

        queries [R, d] and vectors [items, d]: of the model, of one dtype and device; the result has them too.
        histories: of the users, as `CoOccurrence.sums` takes them. cooccurrence: lambda. similarity: mu. Raises
        ValueError if `similarity` is not 0 and there are no coordinates.
        """
        if similarity and self.similarity is not None:
            vectors = torch.cat([vectors, self.similarity.vectors.to(vectors)], dim=1)
        return self.scored_by_joined(queries, vectors, histories, cooccurrence, similarity)

    def scored_by_joined(
        self, queries: Tensor, joined: Tensor, histories: np.ndarray, cooccurrence: float, similarity: float
    ) -> Scores:
        """Return the scores of `scored` by item vectors that end with the coordinates if `similarity` is not 0.

        queries: of the model, [R, d]. joined: [items, d + dims], or [items, d] with a `similarity` of 0. Raises
        ValueError as `scored` does.
        """
        if similarity:
            if self.similarity is None:
                raise ValueError(f"similarity: expected 0 without states, found {similarity}")
            profiles = self.similarity.profiles(histories).to(queries)
            queries = torch.cat([queries, similarity * profiles], dim=1)
        if not cooccurrence:
            return Scores(queries, joined, None)

        def added(rows: np.ndarray) -> AddedScores:
            return self._added(histories[rows], cooccurrence, queries)

        return Scores(queries, joined, added)

    def baseline(self, training_counts: np.ndarray, histories: np.ndarray, device: torch.device) -> Scores:
        """Return the scores of the baseline `neighbours`: popularity and both terms at their default weights.

        training_counts: of each item number, int64 [items + 1]. The tensors are float32, on the device.
        """
        queries, vectors = popularity_scores(training_counts, len(histories), device)
        weights = NEIGHBOUR_WEIGHTS if self.similarity else {**NEIGHBOUR_WEIGHTS, "similarity": 0.0}
        return self.scored(queries, vectors, histories, **weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return all arrays as tensors by name, for a file."""
        arrays = {name: torch.from_numpy(getattr(self.cooccurrence, name)) for name in COOCCURRENCE_DTYPES}
        named = {f"cooccurrence.{name}": tensor for name, tensor in arrays.items()}
        if self.similarity is not None:
            named |= {f"similarity.{name}": getattr(self.similarity, name) for name in SIMILARITY_NAMES}
        return named

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> NeighbourTerms:
        """Return the terms of `tensors()`. Raises ValueError if a tensor is missing or does not fit the others."""
        expected = {f"cooccurrence.{name}" for name in COOCCURRENCE_DTYPES}
        with_similarity = any(name.startswith("similarity.") for name in tensors)
        if with_similarity:
            expected |= {f"similarity.{name}" for name in SIMILARITY_NAMES}
        if tensors.keys() != expected:
            raise ValueError(f"expected tensors {', '.join(sorted(expected))}, found {', '.join(sorted(tensors))}")
        cooccurrence = _cooccurrence_of(tensors)
        similarity = _similarity_of(tensors) if with_similarity else None
        items = len(cooccurrence.offsets) - 1
        if similarity is not None and len(similarity.vectors) != items:
            raise ValueError(f"similarity.vectors: expected {items} items, found {len(similarity.vectors)}")
        return cls(cooccurrence, similarity)

    def _added(self, histories: np.ndarray, weight: float, like: Tensor) -> AddedScores:
        """Return weight * log(1 + 20 M) of the users, in the dtype and on the device of `like`."""
        sums = self.cooccurrence.sums(histories)
        values = np.float32(weight) * np.log1p(np.float32(SUMS_FACTOR) * sums.data)
        return AddedScores(
            torch.from_numpy(sums.indptr.astype(np.int64)).to(like.device),
            torch.from_numpy(sums.indices.astype(np.int64)).to(like.device),
            torch.from_numpy(values).to(like),
        )


def popularity_scores(training_counts: np.ndarray, users: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return queries [users, 1] of ones and vectors [items, 1], 0.3 log(count, at least 0.5), float32.

    training_counts: of each item number, int64 [items + 1].
    """
    scores = POPULARITY_WEIGHT * np.log(np.maximum(training_counts[1:], LEAST_COUNT))
    return torch.ones(users, 1, device=device), torch.from_numpy(scores[:, None]).float().to(device)


def _cooccurrence_of(tensors: Mapping[str, Tensor]) -> CoOccurrence:
    """Return the matrix of named tensors. Raises ValueError if they are no matrix of compressed rows."""
    arrays = {name: tensors[f"cooccurrence.{name}"] for name in COOCCURRENCE_DTYPES}
    for name, tensor in arrays.items():
        if tensor.dtype != COOCCURRENCE_DTYPES[name] or tensor.ndim != 1:
            raise ValueError(f"cooccurrence.{name}: expected {COOCCURRENCE_DTYPES[name]} in one dimension")
    matrix = CoOccurrence(**{name: tensor.numpy() for name, tensor in arrays.items()})
    count = len(matrix.values)
    if not len(matrix.offsets) or matrix.offsets[0] != 0 or matrix.offsets[-1] != count or len(matrix.items) != count:
        raise ValueError(f"cooccurrence.offsets: expected to end with {count} values and as many items")
    if (np.diff(matrix.offsets) < 0).any():
        raise ValueError("cooccurrence.offsets: expected ascending numbers")
    if count and not 0 <= matrix.items.min() <= matrix.items.max() < len(matrix.offsets) - 1:
        raise ValueError(f"cooccurrence.items: expected columns below {len(matrix.offsets) - 1}")
    return matrix


def _similarity_of(tensors: Mapping[str, Tensor]) -> Similarity:
    """Return the coordinates and their map of named tensors. Raises ValueError if they do not fit one another."""
    named = {name: tensors[f"similarity.{name}"] for name in SIMILARITY_NAMES}
    similarity = Similarity(**named)
    if similarity.basis.ndim != 2:
        raise ValueError(f"similarity.basis: expected two dimensions, found {list(similarity.basis.shape)}")
    width, dims = similarity.basis.shape
    shapes = {"vectors": (len(similarity.vectors), dims), "mean": (width,), "scale": (width,), "basis": (width, dims)}
    for name, tensor in named.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"similarity.{name}: expected float32 {list(shapes[name])}, found {tensor.dtype} {list(tensor.shape)}"
            )
    return similarity
