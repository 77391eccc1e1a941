"""Join a tower's bottlenecks without the width between them, which encodes items in fewer products.

A tower's state is a mix of the frozen states and a sum of up-projections: W x = W mix + sum of (W U_j) a_j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.side_towers import GATE_TEMPERATURE
from ..types import Tower


class Composites(NamedTuple):
    """The contributions of a tower's bottlenecks to those above and to its projected output, as C++ takes them."""

    joined: Tensor  # [K, R, K R]: to each layer's bottleneck; zero from the layers that are not below it
    joined_bias: Tensor  # [K, R]
    joined_projection: Tensor  # [d, K R]
    joined_projection_bias: Tensor  # [d]


def composites(tower: Tower, projection: Tensor) -> Composites:
    """Return W U_j for each layer and the projection [d, D], without gradients."""
    layers, bottleneck, width = tower.down_weight.shape
    joined = projection.new_zeros(layers, bottleneck, layers * bottleneck)
    biases = []
    reaching, constant = projection.new_empty(width, 0), projection.new_zeros(width)
    for k, carry in enumerate(_carries(tower)):
        reaching, constant = reaching * carry, constant * carry  # of the layers below, in this one's input
        joined[k, :, : k * bottleneck] = tower.down_weight[k] @ reaching
        biases.append(tower.down_bias[k] + tower.down_weight[k] @ constant)
        reaching, constant = torch.cat([reaching, tower.up_weight[k]], dim=1), constant + tower.up_bias[k]
    return Composites(joined, torch.stack(biases), (projection @ reaching).contiguous(), projection @ constant)


def _carries(tower: Tower) -> list[float]:
    """Return the weight of the state below in each layer's input."""
    if tower.gate is None or len(tower.views) == 2:
        return [1.0] * len(tower.down_weight)
    return [1 - weight for weight in torch.sigmoid(tower.gate / GATE_TEMPERATURE).tolist()]
