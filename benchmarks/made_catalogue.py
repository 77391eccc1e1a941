"""Make a large catalogue with random vectors and terms, and histories over it, without a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config import ModelConfig, RunConfig
from ..data import RunItems
from ..models import CoOccurrence, NeighbourTerms, Recommender, Similarity
from ..serving import Catalogue, ItemMatrix, TrainedModel, UserHistories
from ..training import RankingRun, TermWeights
from .growth import histories

WIDTH = 64
SIMILARITY_DIMS = 128
NEIGHBOURS_OF_AN_ITEM = 10
WEIGHTS = TermWeights(cooccurrence=2.0, similarity=9.0)
BLOCK = 100_000  # items that are drawn at once


def made_model(items: int, device: torch.device) -> TrainedModel:
    """Return a model of random weights over a catalogue of random vectors, with both terms, on a device."""
    config = RunConfig("", "", ("made",), model=ModelConfig(embedding_dim=WIDTH))
    counts = np.ones(items + 1, dtype=np.int64)
    counts[0] = 0
    matrix = made_matrix(items, device)
    sequence_model = Recommender(nn.Identity, config.model, config.protocol.max_inputs, counts / items, 0)
    cooccurrence = made_cooccurrence(items)
    run_items = RunItems([f"i{item}" for item in range(items)], counts, None)
    return TrainedModel(
        run=Path("made"),
        config=config,
        epoch=1,
        catalogue=Catalogue(
            item_ids=run_items.item_ids,
            titles=None,
            training_counts=counts,
            trained=items,
            is_removed=np.zeros(items, dtype=bool),
            vectors=matrix.vectors,
            coordinates=matrix.coordinates,
        ),
        joined=matrix.joined,
        cooccurrence=cooccurrence,
        similarity=Similarity(matrix.coordinates, torch.zeros(1), torch.ones(1), torch.zeros(1, SIMILARITY_DIMS)),
        weights=WEIGHTS,
        encoder=RankingRun(
            config=config,
            items=run_items,
            epoch=1,
            model=sequence_model.to(device).eval(),
            item_vectors=matrix.vectors,
            terms=NeighbourTerms(cooccurrence, None),
            weights=WEIGHTS,
        ),
    )


def made_matrix(items: int, device: torch.device) -> ItemMatrix:
    """Return random vectors, and random coordinates of length 1, in the memory that scores read."""
    generator = torch.Generator().manual_seed(0)
    matrix = ItemMatrix.empty(items, WIDTH, SIMILARITY_DIMS, WEIGHTS, device)
    for part in torch.arange(items).split(BLOCK):
        drawn = torch.randn(len(part), WIDTH + SIMILARITY_DIMS, generator=generator)
        vectors, coordinates = drawn.split((WIDTH, SIMILARITY_DIMS), dim=1)
        matrix.vectors[part] = vectors.to(device)
        matrix.coordinates[part] = coordinates / coordinates.norm(dim=1, keepdim=True)
    matrix.complete(np.ones(items + 1, dtype=np.int64))
    return matrix


def made_cooccurrence(items: int) -> CoOccurrence:
    """Return a matrix with ten random neighbours of each item, or as many as there are items."""
    neighbours = min(NEIGHBOURS_OF_AN_ITEM, items)
    generator = np.random.default_rng(0)
    columns = np.empty((items, neighbours), dtype=np.int32)
    for first in range(0, items, BLOCK):
        count = min(BLOCK, items - first)
        steps = generator.integers(1, items // neighbours + 1, (count, neighbours))  # their sum is at most `items`
        drawn = (generator.integers(0, items, (count, 1)) + np.cumsum(steps, axis=1)) % items
        columns[first : first + count] = np.sort(drawn, axis=1)
    offsets = np.arange(items + 1, dtype=np.int64) * neighbours
    values = generator.random(items * neighbours, dtype=np.float32) + np.float32(0.01)
    return CoOccurrence(offsets, columns.ravel(), values)


def made_histories(items: int, users: int) -> UserHistories:
    """Return random histories of 5 to 13 items, most of them popular."""
    sequences = histories(items, users)
    return UserHistories(sequences.user_ids, sequences.offsets, sequences.items)
