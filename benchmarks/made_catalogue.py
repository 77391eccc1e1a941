"""Make a large catalogue with random vectors and terms, and histories over it, without a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config import ModelConfig, RunConfig
from ..data import RunItems
from ..models import CoOccurrence, NeighbourTerms, Recommender, Similarity
from ..serving import Catalogue, TrainedModel, UserHistories
from ..training import RankingRun, TermWeights
from .growth import histories

WIDTH = 64
SIMILARITY_DIMS = 128
NEIGHBOURS_OF_AN_ITEM = 10
WEIGHTS = TermWeights(cooccurrence=2.0, similarity=9.0)
BLOCK = 100_000  # items whose neighbours are drawn at once


def made_model(items: int, device: torch.device) -> TrainedModel:
    """Return a model of random weights over a catalogue of random vectors, with both terms, on a device."""
    config = RunConfig("", "", ("made",), model=ModelConfig(embedding_dim=WIDTH))
    counts = np.ones(items + 1, dtype=np.int64)
    counts[0] = 0
    popularity = counts / items
    model = Recommender(nn.Identity, config.model, config.protocol.max_inputs, popularity, config.train.seed)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(items, WIDTH, generator=generator).to(device)
    coordinates = torch.randn(items, SIMILARITY_DIMS, generator=generator)
    coordinates /= coordinates.norm(dim=1, keepdim=True)
    similarity = Similarity(coordinates, torch.zeros(1), torch.ones(1), torch.zeros(1, SIMILARITY_DIMS))
    cooccurrence = made_cooccurrence(items)
    run_items = RunItems([f"i{item}" for item in range(items)], counts, None)
    terms = NeighbourTerms(cooccurrence, similarity)
    ranking = RankingRun(config, run_items, 1, model.to(device).eval(), vectors, terms, WEIGHTS)
    catalogue = Catalogue(
        run_items.item_ids, None, counts, items, np.zeros(items, dtype=bool), ranking.item_vectors, coordinates
    )
    return TrainedModel(Path("made"), config, 1, catalogue, cooccurrence, similarity, WEIGHTS, ranking)


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
