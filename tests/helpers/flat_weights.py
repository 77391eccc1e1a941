"""Weights of towers and heads as views of one flat buffer, as in a fused step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iisan_fast.kernels import FLAT_ALIGNMENT, RecommenderWeights, SequenceWeights, Tower


def side_weights(
    kinds: Sequence[tuple[int, ...]],
    layers: int = 3,
    width: int = 48,
    bottleneck: int = 16,
    dim: int = 32,
    hidden: Sequence[int] | None = None,
    gated: bool = True,
) -> RecommenderWeights:
    """Return weights without values (on meta) for towers over these views; the sequence encoder's are left out.

    Args: hidden: rows of each tower's inner map, its width where None.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    towers = [
        Tower(
            kind,
            empty(layers) if gated else None,
            empty(layers, bottleneck, width),
            empty(layers, bottleneck),
            empty(layers, width, bottleneck),
            empty(layers, width),
        )
        for kind in kinds
    ]
    heads = [(empty(dim, rows), empty(dim), empty(rows, width), empty(rows)) for rows in hidden or [width] * len(kinds)]
    sequence = SequenceWeights([], heads=1, epsilon=1e-6)
    return RecommenderWeights(towers, "relu", heads, empty(dim, len(kinds) * dim), empty(dim), sequence)


def flat_size(weights: RecommenderWeights) -> int:
    """Return how many elements a flat buffer of these weights has."""
    return sum(-(-weight.numel() // FLAT_ALIGNMENT) * FLAT_ALIGNMENT for weight in weights.tensors())


def in_buffer(weights: RecommenderWeights, buffer: Tensor) -> RecommenderWeights:
    """Return views of a flat buffer in the shapes of these weights; their values are not copied."""
    start = 0

    def view(weight: Tensor) -> Tensor:
        nonlocal start
        part = buffer[start : start + weight.numel()].view(weight.shape)
        start += -(-weight.numel() // FLAT_ALIGNMENT) * FLAT_ALIGNMENT
        return part

    return weights.mapped(view)
