"""The fold and its backward in Triton against the formulas in fp64, written plainly and differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.flat_weights import flat_size, in_buffer, side_weights
from helpers.kernel_cases import DEVICE, INTRA_AND_INTER
from iisan_fast.kernels import RecommenderWeights
from iisan_fast.kernels.gpu.fold_heads import FoldHeads, refusal
from iisan_fast.kernels.gpu.launch import Launch, launches, recording
from iisan_fast.kernels.types import TowerGradients

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
OUTPUTS = ("coefficients", "bias", "composites", "projected_up", "projections", "vector_bias")
TOLERANCE = 3e-6  # of the largest element: fp32 sums of up to some thousand products


class Fold:
    """A pair on random weights, with random gradients from the towers."""

    def __init__(self, seed: int = 3, **shape) -> None:
        torch.manual_seed(seed)
        self.shapes = side_weights(**shape)
        size = flat_size(self.shapes)
        self.buffer = torch.randn(size, device=DEVICE) / 4
        self.gradient = torch.full((size,), float("nan"), device=DEVICE)
        self.weights, gradients = in_buffer(self.shapes, self.buffer), in_buffer(self.shapes, self.gradient)
        self.pair = FoldHeads(self.weights, self.weights, gradients, torch.float32)
        self.towers = towers_gradients(self.pair, self.weights)
        self.pair.connect(self.towers)

    def run(self) -> list[Tensor]:
        """Return copies of the outputs, then of the gradients of all weights."""
        self.gradient.fill_(float("nan"))
        self.pair.forward()
        self.pair.backward()
        outputs = [getattr(self.pair, name).clone() for name in OUTPUTS]
        return [*outputs, *(gradient.clone() for gradient in in_buffer(self.shapes, self.gradient).tensors())]

    def expected(self) -> list[Tensor]:
        """Return the same in fp64, by autograd."""
        weights = self.weights.mapped(lambda weight: weight.double().requires_grad_())
        outputs = plainly_folded(weights)
        names = ("of_coefficients", "of_bias", "of_composites", "of_projected_up", "of_projections", "of_vector_bias")
        gradients = [getattr(self.towers, name).double().nan_to_num() for name in names]
        trained = [pair for pair in zip(outputs, gradients) if pair[0].requires_grad]  # all but constant coefficients
        torch.autograd.backward(*zip(*trained))
        for tower, of_down in zip(weights.towers, self.towers.of_down):
            tower.down_weight.grad += of_down
        return [*(output.detach() for output in outputs), *(weight.grad for weight in weights.tensors())]

    def check(self) -> None:
        """The pair against autograd."""
        for number, (actual, expected) in enumerate(zip(self.run(), self.expected(), strict=True)):
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error < TOLERANCE, (number, tuple(expected.shape), error.item())


def towers_gradients(pair: FoldHeads, weights: RecommenderWeights) -> TowerGradients:
    """Return random gradients, as the towers' backward gives them: those of pairs that are not read are NaN."""

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
        gate = torch.ones(layers).double() if tower.gate is None else torch.sigmoid(tower.gate / 0.1)
        rest = gate if tower.gate is None else 1 - gate
        one, zero = torch.ones_like(gate), torch.zeros_like(gate)
        mixed = {(0,): (rest, gate, zero), (1,): (rest, zero, gate), (0, 1): (one, gate, rest)}[tower.views]
        carry = mixed[0]
        biases, projected, composites = [], [], []
        for k in range(layers):
            bias, blocks = tower.down_bias[k], []
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


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"kinds": INTRA_AND_INTER, "layers": 2, "width": 32}, id="three towers"),
        pytest.param({"kinds": INTRA_AND_INTER[1:], "gated": False, "layers": 3, "width": 16}, id="no gates"),
        pytest.param({"kinds": [(0,)], "layers": 1}, id="one layer of one tower"),
        pytest.param({"kinds": [(1,), (0, 1)], "hidden": [32, 48], "width": 48}, id="Versa's heads"),
        pytest.param({"kinds": [(0, 1)], "width": 37, "bottleneck": 9, "dim": 20, "layers": 4}, id="odd sizes"),
        pytest.param({"kinds": [(0,)], "bottleneck": 40, "dim": 36, "layers": 2}, id="several tiles a side"),
        pytest.param(
            {"kinds": [(0,)], "width": 20, "bottleneck": 8, "dim": 16, "layers": 13},
            id="thirteen layers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"kinds": [(0,), (0, 1)], "width": 96, "dim": 16, "hidden": [16, 96], "layers": 2},
            id="several tiles of the width",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_output_and_gradient(shape):
    Fold(**shape).check()


def test_steps_repeat_bit_for_bit():
    fold = Fold(kinds=[(1,)], layers=2, width=16)
    for first, second in zip(fold.run(), fold.run()):
        assert torch.equal(first, second)


def test_nothing_is_written_between_the_weights():
    fold = Fold(kinds=[(0,)], layers=1, width=20)
    fold.run()
    is_weight = torch.zeros(len(fold.gradient), dtype=torch.bool, device=DEVICE)
    for view in in_buffer(fold.shapes, is_weight).tensors():
        view.fill_(True)
    assert torch.equal(~fold.gradient.isnan(), is_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_launches_a_step(dtype):
    shapes = side_weights(INTRA_AND_INTER, 7, 768, 64, 64)
    weights, gradients = (in_buffer(shapes, torch.empty(flat_size(shapes), device="meta")) for _ in range(2))
    operands = weights.mapped(lambda weight: weight)
    if dtype != torch.float32:
        operands = in_buffer(shapes, torch.empty(flat_size(shapes), dtype=dtype, device="meta"))
    recorded: list[Launch] = []
    launches.clear()
    with recording(recorded.append):
        pair = FoldHeads(weights, operands, gradients, dtype)
        pair.connect(towers_gradients(pair, weights))
        pair.forward()
        pair.backward()
    assert [made.name for made in recorded] == ["fold_chains", "fold_prepare", "fold_backward", "fold_chains_backward"]
    assert launches.total() == 4
    assert all(made.grid[0] == 3 and made.grid[1] > 44 for made in recorded)  # the 132 multiprocessors of a GPU work
    assert {pair.composites.dtype, pair.projected_up.dtype, pair.projection_operands.dtype} == {dtype}


def test_refusals():
    meta = side_weights([(0,), (1,)])
    flat = in_buffer(meta, torch.empty(flat_size(meta)))
    assert refusal(flat) == ""
    assert refusal(flat.mapped(torch.clone)) == "the weights are no views of one flat buffer"
    assert refusal(side_weights([(0,)], dim=160)) == "it takes at most 128 dimensions of an item vector, found 160"
    unlike = meta._replace(towers=[meta.towers[0], side_weights([(1,)], gated=False).towers[0]])
    assert refusal(unlike) == "towers have unlike shapes, or gates in part"
    with pytest.raises(ValueError, match="unlike shapes"):
        FoldHeads(unlike, unlike, unlike, torch.float32)
    other = in_buffer(meta, torch.empty(flat_size(meta) + 64)[64:])
    FoldHeads(flat, flat, other, torch.float32)  # a layout is relative to the first weight
    with pytest.raises(ValueError, match="expected gradients laid out as the weights are"):
        FoldHeads(flat, flat, other._replace(heads=other.heads[::-1]), torch.float32)
