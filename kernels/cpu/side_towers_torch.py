"""The towers of a side network on a CPU by PyTorch, with a backward written by hand, two halves of the items at once.

What autograd adds is left out: gradients of frozen states, copies of a product's summand, a pass each for the gate, its
complement and their gradients. Each half stays in one core's cache, and its thread waits for nobody between products,
where one product on many threads waits for the slowest each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.side_towers import ACTIVATION_FUNCTIONS, GATE_TEMPERATURE
from ..threads import at_once, equal_parts
from ..types import States, Tower

PARAMETERS = len(Tower._fields) - 1  # of a tower: all but its views
HALVES = 2
MOST_UNTRAINED = 512  # items at a time where no backward follows, so that their states stay in the cache


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the reference's outputs, differentiable once. The caller has checked the arguments."""
    tables = [view.table for view in states]
    parameters = [parameter for tower in towers for parameter in tower[1:]] + list(projections or ())
    settings = TorchTowerSettings(
        activation,
        towers[0].down_weight.dtype,
        [tower.views for tower in towers],
        [view.rows for view in states],
        projections is not None,
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tables + parameters),
    )
    return list(TorchTowersFunction.apply(settings, *tables, *parameters))


class TorchTowerSettings(NamedTuple):
    """What towers depend on beside tables and parameters."""

    activation: str
    dtype: torch.dtype
    reads: list[tuple[int, ...]]  # the views of each tower
    rows: list[Tensor | None]  # of each view
    projected: bool
    trained: bool  # a backward may come


class LayerMix(NamedTuple):
    """A layer's input is carry * state + first * h_first + second * h_second."""

    carry: float
    first: float
    second: float


UNGATED = LayerMix(1.0, 1.0, 1.0)


class TowerWeights(NamedTuple):
    """A tower's weights in the dtype of its products, its gates as mixes."""

    views: tuple[int, ...]
    mixes: list[LayerMix]
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    projection: Tensor | None


class TowerActivations(NamedTuple):
    """What a tower's backward needs of its forward."""

    inputs: Tensor  # [K, N, D]
    before: Tensor  # [K, N, R], the bottlenecks; those after a ReLU take their place
    after: Tensor  # [K, N, R]
    output: Tensor  # [N, D]


class ItemsHalf(NamedTuple):
    """What the backward of one half of the items needs of their forward."""

    part: slice
    views: list[Tensor]
    towers: list[TowerActivations]


class TorchTowersFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: TorchTowerSettings, *tensors: Tensor) -> tuple[Tensor, ...]:
        tables, parameters = tensors[: len(settings.rows)], tensors[len(settings.rows) :]
        towers = _weights(settings, parameters)
        items = len(tables[0]) if settings.rows[0] is None else len(settings.rows[0])
        parts = equal_parts(items, items if settings.trained else MOST_UNTRAINED, HALVES)

        if settings.projected and not settings.trained:
            joined = [composites(tower) for tower in towers]

        def forward_part(part: slice) -> tuple[list[Tensor], ItemsHalf | None]:
            views = [_by_layer(table, rows, part, settings.dtype) for table, rows in zip(tables, settings.rows)]
            if settings.projected and not settings.trained:
                return [_projected(views, *pair, settings.activation) for pair in zip(towers, joined)], None
            activations = [_forward(views, tower, settings) for tower in towers]
            outputs = [_product(tower.projection, result.output) for tower, result in zip(towers, activations)]
            return outputs, ItemsHalf(part, views, activations) if settings.trained else None

        outputs, halves = zip(*at_once(forward_part, parts, HALVES))
        if settings.trained:
            ctx.settings, ctx.towers, ctx.halves = settings, towers, halves
            ctx.save_for_backward(*parameters)  # alone to refuse parameters that were changed in between
        return tuple(torch.cat(parts).to(parameters[1].dtype) for parts in zip(*outputs))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        settings, towers, parameters = ctx.settings, ctx.towers, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1 : 1 + len(settings.rows)]

        def backward_half(half: ItemsHalf) -> tuple[list[Tensor | None], list[list[Tensor]]]:
            part, views, activations = half
            of_views = [torch.zeros_like(view) if want else None for view, want in zip(views, wanted)]
            gradients = [
                _backward(gradient[part].to(settings.dtype), of_tower, views, of_views, tower, settings.activation)
                for gradient, of_tower, tower in zip(upstream, activations, towers)
            ]
            return of_views, gradients

        of_views, gradients = zip(*at_once(backward_half, ctx.halves, HALVES))
        views = [None if parts[0] is None else torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*of_views)]
        totals = [[_total(parts, parameters[1].dtype) for parts in zip(*halves)] for halves in zip(*gradients)]
        of_parameters = [value for total in totals for value in total[:PARAMETERS]]
        for i, tower in enumerate(towers):
            if tower.mixes[0] is UNGATED:
                of_parameters[PARAMETERS * i] = None
        return None, *views, *of_parameters, *(total[-1] for total in totals if settings.projected)


def _forward(views: list[Tensor], tower: TowerWeights, settings: TorchTowerSettings) -> TowerActivations:
    """Run a tower over N items; layers overwrite one another if no backward follows."""
    layers, bottleneck, width = tower.down_weight.shape
    items, slots = views[0].shape[1], layers if settings.trained else 1
    inputs = tower.down_weight.new_empty(slots, items, width)
    before = tower.down_weight.new_empty(slots, items, bottleneck)
    after = before if settings.activation == "relu" else torch.empty_like(before)
    state = tower.down_weight.new_zeros(items, width)
    read = [views[view] for view in tower.views]
    for k, mix in enumerate(tower.mixes):
        slot = k % slots
        x = _mixed(mix, state, *(view[k] for view in read), out=inputs[slot])
        z = torch.addmm(tower.down_bias[k], x, tower.down_weight[k].T, out=before[slot])
        if settings.activation == "relu":
            a = z.relu_()
        else:
            a = after[slot].copy_(ACTIVATION_FUNCTIONS[settings.activation](z))
        torch.add(x, tower.up_bias[k], out=state)
        state.addmm_(a, tower.up_weight[k].T)
    return TowerActivations(inputs, before, after, state)


class Composites(NamedTuple):
    """What the bottlenecks below add to each layer's, and all of them to the output, without the width between."""

    weights: list[Tensor]  # [R, k R] a layer
    biases: list[Tensor]  # [R] a layer
    projection: Tensor  # [d, K R]
    bias: Tensor  # [d]


def composites(tower: TowerWeights) -> Composites:
    """Return W U_j for each layer and the projection.

    A tower's state is a mix of the frozen states and a sum of up-projections: W x = W mix + sum of (W U_j) a_j.
    """
    weights, biases = [], []
    width = tower.down_weight.shape[2]
    reaching, constant = tower.up_weight.new_empty(width, 0), tower.up_weight.new_zeros(width)
    for k, mix in enumerate(tower.mixes):
        reaching, constant = reaching * mix.carry, constant * mix.carry  # of the layers below, in this one's input
        weights.append(tower.down_weight[k] @ reaching)
        biases.append(tower.down_bias[k] + tower.down_weight[k] @ constant)
        reaching, constant = torch.cat([reaching, tower.up_weight[k]], dim=1), constant + tower.up_bias[k]
    return Composites(weights, biases, tower.projection @ reaching, tower.projection @ constant)


def _projected(views: list[Tensor], tower: TowerWeights, composites: Composites, activation: str) -> Tensor:
    """Return a tower's projected output [N, d] if no backward follows: a third fewer products than `_forward`."""
    layers, bottleneck, width = tower.down_weight.shape
    items, read = views[0].shape[1], [views[view] for view in tower.views]
    mixed, other = tower.down_weight.new_zeros(2, items, width)
    activated = tower.down_weight.new_empty(items, layers * bottleneck)
    for k, mix in enumerate(tower.mixes):
        mixed, other = _mixed(mix, mixed, *(view[k] for view in read), out=other), mixed
        z = torch.addmm(composites.biases[k], mixed, tower.down_weight[k].T)
        z.addmm_(activated[:, : k * bottleneck], composites.weights[k].T)
        activated[:, k * bottleneck : (k + 1) * bottleneck] = ACTIVATION_FUNCTIONS[activation](z)
    return torch.addmm(composites.bias, mixed, tower.projection.T).addmm_(activated, composites.projection.T)


def _backward(
    upstream: Tensor,
    activations: TowerActivations,
    views: list[Tensor],
    of_views: list[Tensor | None],
    tower: TowerWeights,
    activation: str,
) -> list[Tensor]:
    """Return gradients of the tower's gate [K], weights, biases and projection, if there is one; add to `of_views`.

    The gradient of s_k-1, a layer's state, is the carry times that of the next layer's input, so with one view the
    gate's is g (<ds_k-1, h_k> - <ds_k-1, s_k-1>) / 0.1, and <ds_k-1, s_k-1> comes from what layer k - 1 needs anyway.
    """
    gradient = upstream.clone() if tower.projection is None else upstream @ tower.projection
    of_weights = [torch.empty_like(weight) for weight in tower[2:6]]
    of_down, of_down_bias, of_up, of_up_bias = of_weights
    read, of_read = [views[view] for view in tower.views], [of_views[view] for view in tower.views]
    of_gate, with_state = [], []
    for k in reversed(range(len(tower.mixes))):
        mix, x, a = tower.mixes[k], activations.inputs[k], activations.after[k]
        torch.sum(gradient, 0, out=of_up_bias[k])
        of_a = gradient @ tower.up_weight[k]
        if len(read) == 1:
            with_state.append(_dot(gradient, x) + _dot(of_up_bias[k], tower.up_bias[k]) + _dot(of_a, a))
        torch.mm(gradient.T, a, out=of_up[k])
        of_z = _activation_backward(of_a, activations.before[k], activation)
        torch.sum(of_z, 0, out=of_down_bias[k])
        torch.mm(of_z.T, x, out=of_down[k])
        gradient.addmm_(of_z, tower.down_weight[k])
        for of_view, weight in zip(of_read, mix[1:]):
            if of_view is not None:
                of_view[k].add_(gradient, alpha=weight)
        if mix.carry != 1:
            gradient.mul_(mix.carry)
        if len(read) == 1:
            of_gate.append(mix.first * _dot(gradient, read[0][k]))
        else:
            of_gate.append(mix.first * mix.second * (_dot(gradient, read[0][k]) - _dot(gradient, read[1][k])))
    gates = torch.stack(of_gate[::-1])
    if len(read) == 1:
        weights = gates.new_tensor([mix.first for mix in tower.mixes[1:]])
        gates[1:] -= weights * torch.stack(with_state[::-1])[:-1]
    of_projection = [] if tower.projection is None else [upstream.T @ activations.output]
    return [gates / GATE_TEMPERATURE, *of_weights, *of_projection]


def _weights(settings: TorchTowerSettings, parameters: Sequence[Tensor | None]) -> list[TowerWeights]:
    """Return the towers with their weights in the dtype of the products."""
    count = len(settings.reads)
    cast = [None if parameter is None else parameter.to(settings.dtype) for parameter in parameters]
    projections = cast[PARAMETERS * count :] if settings.projected else [None] * count
    return [
        TowerWeights(
            reads,
            mixes(parameters[PARAMETERS * i], len(reads), len(cast[PARAMETERS * i + 1])),
            *cast[PARAMETERS * i + 1 : PARAMETERS * (i + 1)],
            projections[i],
        )
        for i, reads in enumerate(settings.reads)
    ]


def mixes(gate: Tensor | None, views: int, layers: int) -> list[LayerMix]:
    """Return each layer's mix, by its gate if it has one."""
    if gate is None:
        return [UNGATED] * layers
    weights = torch.sigmoid(gate / GATE_TEMPERATURE).tolist()
    return [LayerMix(1 - weight if views == 1 else 1.0, weight, 1 - weight) for weight in weights]


def _mixed(mix: LayerMix, state: Tensor, first: Tensor, second: Tensor | None = None, *, out: Tensor) -> Tensor:
    if second is None:
        return torch.add(state, first, out=out) if mix == UNGATED else torch.lerp(state, first, mix.first, out=out)
    if mix == UNGATED:
        return torch.add(first, second, out=out).add_(state)
    return torch.lerp(second, first, mix.first, out=out).add_(state)


def _activation_backward(gradient: Tensor, before: Tensor, activation: str) -> Tensor:
    """Return the gradient of an activation's input. For ReLU `before` may be its output too: both have one sign."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, before, 0)
    return torch.ops.aten.gelu_backward(gradient, before)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products of all elements, in fp32 or more."""
    if a.dtype.itemsize < 4:
        return (a * b).sum(dtype=torch.float32)
    return torch.dot(a.flatten(), b.flatten())


def _product(projection: Tensor | None, output: Tensor) -> Tensor:
    return output if projection is None else output @ projection.T


def _total(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Add up the halves' gradients, in place of the first if possible."""
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total += part
    return total


def _by_layer(table: Tensor, rows: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    """Return a part of a view's rows, layer by layer: [K, N, D]."""
    gathered = table[part] if rows is None else table.index_select(0, rows[part])
    items, layers, width = gathered.shape
    return torch.empty((layers, items, width), dtype=dtype).copy_(gathered.transpose(0, 1))
