"""Recommenders over side networks of any shape."""

from __future__ import annotations

import functools

import numpy as np

from iisan_fast.config import ModelConfig
from iisan_fast.models.recommender import Recommender
from iisan_fast.models.side_network import SideItemEncoder


def side_recommender(
    shapes: list[tuple[int, int]], config: ModelConfig, max_inputs: int, popularity: np.ndarray, seed: int
) -> Recommender:
    """IISAN over views of the given shapes (K, D)."""
    return Recommender(functools.partial(SideItemEncoder, shapes, config), config, max_inputs, popularity, seed)
