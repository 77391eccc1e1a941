"""Folds of heads on random weights, and their expected results: the formulas in fp64, in plain loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.flat_weights import flat_size, in_buffer, side_weights
from helpers.kernel_cases import DEVICE
from iisan_fast.kernels import RecommenderWeights
from iisan_fast.kernels.gpu.fold_heads import FoldHeads
from iisan_fast.kernels.types import TowerGradients

OUTPUTS = ("coefficients", "bias", "composites", "projected_up", "projections", "vector_bias")
# Errors relative to a tensor's norm: fp32 sums up to some thousand products, bf16 rounds three times in a row.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


class Fold:
    """A pair on random weights, with random gradients from the towers."""

    def __init__(self, dtype: torch.dtype = torch.float32, **shape: Any) -> None:
        """dtype: dtype of the products; shape: arguments of `side_weights`."""
        torch.manual_seed(3)
        self.dtype = dtype
        self.shapes = side_weights(**shape)
        size = flat_size(self.shapes)
        self.buffer = torch.randn(size, device=DEVICE) / 4
        self.gradient = torch.full((size,), float("nan"), device=DEVICE)
        self.weights = in_buffer(self.shapes, self.buffer)
        gradients = in_buffer(self.shapes, self.gradient)
        operands = in_buffer(self.shapes, self.buffer.to(dtype))  # the weights' memory if that is fp32
        self.pair = FoldHeads(self.weights, operands, gradients, dtype)
        self.towers = towers_gradients(self.pair, self.weights)
        self.pair.connect(self.towers)

    def run(self) -> list[Tensor]:
        """Return the results of a forward and a backward."""
        self.gradient.fill_(float("nan"))
        self.pair.forward()
        self.pair.backward()
        return self.results()

    def results(self) -> list[Tensor]:
        """Return copies of the outputs, then of the gradients of all weights."""
        outputs = [getattr(self.pair, name).clone() for name in OUTPUTS]
        return [*outputs, *(gradient.clone() for gradient in in_buffer(self.shapes, self.gradient).tensors())]

    def expected(self) -> list[Tensor]:
        """Return the outputs and gradients in fp64, by autograd."""
        weights = self.weights.mapped(lambda weight: weight.double().requires_grad_())
        outputs = plainly_folded(weights)
        names = ("of_coefficients", "of_bias", "of_composites", "of_projected_up", "of_projections", "of_vector_bias")
        gradients = [getattr(self.towers, name).double().nan_to_num() for name in names]
        trained = [
            pair for pair in zip(outputs, gradients) if pair[0].requires_grad
        ]  # all outputs but constant coefficients
        torch.autograd.backward(*zip(*trained))
        for tower, of_down in zip(weights.towers, self.towers.of_down):
            tower.down_weight.grad += of_down
        return [*(output.detach() for output in outputs), *(weight.grad for weight in weights.tensors())]

    def check(self) -> None:
        """Compare the pair with autograd."""
        for number, (actual, expected) in enumerate(zip(self.run(), self.expected(), strict=True)):
            error = (actual - expected).norm() / expected.norm().clamp(min=1e-3)
            assert error < TOLERANCES[self.dtype], (number, tuple(expected.shape), error.item())


def towers_gradients(pair: FoldHeads, weights: RecommenderWeights) -> TowerGradients:
    """Return random gradients in the layout of the towers' backward; gradients that are not read are NaN."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=pair.bias.device)

    of_down = random(len(weights.towers), *weights.towers[0].down_weight.shape)
    of_composites = random(*pair.composites.shape)
    for k in range(pair.composites.shape[1]):
        of_composites[:, k, :, k:] = float("nan")
    shapes = (pair.projected_up.shape, pair.projections.shape, pair.vector_bias.shape)
    rest = (random(*shape) for shape in shapes)
    return TowerGradients(random(*pair.coefficients.shape), of_down, random(*pair.bias.shape), of_composites, *rest)


def plainly_folded(weights: RecommenderWeights) -> list[Tensor]:
    """Return the outputs by loops over towers and layers, in the order of OUTPUTS."""
    dim = len(weights.fusion_bias)
    by_tower = []
    vector_bias = weights.fusion_bias
    for tower, outer, head in zip(weights.towers, weights.fusion.split(dim, dim=1), weights.heads):
        middle, middle_bias, inner, inner_bias = head
        projection = outer @ middle @ inner
        layers = len(tower.up_bias)
        gate = (
            torch.ones(layers, dtype=torch.float64, device=outer.device)
            if tower.gate is None
            else torch.sigmoid(tower.gate / 0.1)
        )
        rest = gate if tower.gate is None else 1 - gate
        one = torch.ones_like(gate)
        zero = torch.zeros_like(gate)
        mixed = {(0,): (rest, gate, zero), (1,): (rest, zero, gate), (0, 1): (one, gate, rest)}[tower.views]
        carry = mixed[0]
        biases, projected, composites = [], [], []
        for k in range(layers):
            bias = tower.down_bias[k]
            blocks = []
            for j in range(layers):
                below = carry[j + 1 : k + 1].prod() if j < k else 0.0
                blocks.append(below * (tower.down_weight[k] @ tower.up_weight[j]))
                bias = bias + below * (tower.down_weight[k] @ tower.up_bias[j])
            biases.append(bias)
            composites.append(torch.stack(blocks, dim=1))
            final = carry[k + 1 :].prod()
            projected.append(final * (projection @ tower.up_weight[k]).mT)
            vector_bias = vector_bias + final * (projection @ tower.up_bias[k])
        vector_bias = vector_bias + outer @ (middle @ inner_bias + middle_bias)
        by_tower.append((torch.stack(mixed, 1), *map(torch.stack, (biases, composites, projected)), projection))
    return [*map(torch.stack, zip(*by_tower)), vector_bias]
