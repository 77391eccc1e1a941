"""Multiply a tower's up-projections with the maps that follow them, so that encoding needs fewer products.

A tower's state is x = (a mix of hidden states) + sum over layers j of U_j a_j, with bottleneck outputs a_j. So a map W
gives W x = W mix + sum of (W U_j) a_j, and W U_j is computed once for all items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.side_towers import GATE_TEMPERATURE
from ..types import Tower


class Composites(NamedTuple):
    """The products W U_j of one tower; the fields are those of `Tower` in cpp/tower.h."""

    joined: Tensor  # [K, R, K R]: from all bottleneck outputs to each layer's bottleneck; 0 from layers not below it
    joined_bias: Tensor  # [K, R]: the layer's bias and what the up biases below it add
    joined_projection: Tensor  # [d, K R]: from all bottleneck outputs to the projected output
    joined_projection_bias: Tensor  # [d]


def composites(tower: Tower, projection: Tensor) -> Composites:
    """Return the products of a tower's maps and of a projection [d, D] with its up-projections, without gradients."""
    layers, bottleneck, width = tower.down_weight.shape
    joined = projection.new_zeros(layers, bottleneck, layers * bottleneck)
    biases = []
    reaching = projection.new_empty(width, 0)
    constant = projection.new_zeros(width)
    for k, carry in enumerate(_carries(tower)):
        reaching, constant = reaching * carry, constant * carry  # scaled to their weights in this layer's input
        joined[k, :, : k * bottleneck] = tower.down_weight[k] @ reaching
        biases.append(tower.down_bias[k] + tower.down_weight[k] @ constant)
        reaching, constant = torch.cat([reaching, tower.up_weight[k]], dim=1), constant + tower.up_bias[k]
    return Composites(joined, torch.stack(biases), (projection @ reaching).contiguous(), projection @ constant)


def _carries(tower: Tower) -> list[float]:
    """Return the weight of the previous state in each layer's input: 1 - gate over one view, else 1."""
    if tower.gate is None or len(tower.views) == 2:
        return [1.0] * len(tower.down_weight)
    return [1 - weight for weight in torch.sigmoid(tower.gate / GATE_TEMPERATURE).tolist()]
