"""The towers of a side network in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import States, Tower

ACTIVATION_FUNCTIONS = {"relu": F.relu, "gelu": F.gelu}
GATE_TEMPERATURE = 0.1


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the output of each tower, [N, D] or, with projections [d, D], [N, d], in the weights' dtype.

    All towers have one shape (K, R, D). A tower reads one view or both. The outputs are differentiable in parameters,
    projections and tables.
    """
    views = [view.table if view.rows is None else view.table[view.rows] for view in states]
    outputs = [
        side_tower(views[tower.views[0]], views[1] if len(tower.views) == 2 else None, *tower[1:], activation)
        for tower in towers
    ]
    return outputs if projections is None else list(map(F.linear, outputs, projections))


def side_tower(
    first: Tensor,
    second: Tensor | None,
    gate: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str = "relu",
) -> Tensor:
    """Return the output [N, D] of one tower over K layers (IISAN, equations 2-4, as the released code computes them).

    With SANB(x) = x + W_up act(W_down x + b_down) + b_up and g = sigmoid(gate / 0.1), from s = 0, layer i computes
        intra (second is None): s = SANB_i(g_i first_i + (1 - g_i) s)
        inter:                  s = SANB_i(s + g_i first_i + (1 - g_i) second_i)
    Without gates all weights are 1.

    Args:
        first, second: hidden states [N, K, D] of any floating dtype; the result has the weights' dtype.
        gate: [K], or None.
        down_weight, down_bias: [K, R, D] and [K, R].
        up_weight, up_bias: [K, D, R] and [K, D].
        activation: "relu" or "gelu".
    """
    act = ACTIVATION_FUNCTIONS[activation]
    state = down_weight.new_zeros(first.shape[0], first.shape[2])
    weights = None if gate is None else torch.sigmoid(gate / GATE_TEMPERATURE)
    # unbind stacks the layers' gradients once; an index would make a zero-filled gradient for each layer.
    layers = zip(down_weight.unbind(), down_bias.unbind(), up_weight.unbind(), up_bias.unbind())
    for i, (down, bias, up, constant) in enumerate(layers):
        h = first[:, i].to(state.dtype)
        other = state if second is None else second[:, i].to(state.dtype)
        mixed = h + other if weights is None else torch.lerp(other, h, weights[i])
        x = mixed if second is None else state + mixed
        state = x + F.linear(act(F.linear(x, down, bias)), up, constant)
    return state
