"""The fold and its backward in Triton against the formulas in fp64, written plainly and differentiated by autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.flat_weights import flat_size, in_buffer, side_weights
from helpers.folds import OUTPUTS, Fold, towers_gradients
from helpers.kernel_cases import DEVICE, INTRA_AND_INTER
from helpers.recommenders import side_recommender
from iisan_fast.config import ModelConfig
from iisan_fast.kernels.gpu.fold_heads import FoldHeads, refusal
from iisan_fast.kernels.gpu.launch import Launch, launches, recording
from iisan_fast.kernels.gpu.tower_operands import tower_operands
from iisan_fast.training.flat_storage import FlatStorage

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"kinds": INTRA_AND_INTER, "layers": 2, "width": 32}, id="three towers"),
        pytest.param({"kinds": INTRA_AND_INTER[1:], "gated": False, "layers": 3, "width": 16}, id="no gates"),
        pytest.param({"kinds": [(0,)], "layers": 1}, id="one layer of one tower"),
        pytest.param(
            {"kinds": [(1,), (0, 1)], "layers": 2, "hidden": [20, 32], "width": 32, "dim": 20}, id="Versa's heads"
        ),
        pytest.param({"kinds": [(0, 1)], "width": 37, "bottleneck": 9, "dim": 11}, id="odd sizes"),
        pytest.param(
            {"kinds": [(0,)], "bottleneck": 24, "dim": 36, "layers": 2, "width": 32}, id="several tiles a side"
        ),
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


def test_steps_repeat_bit_for_bit_and_write_nothing_between_the_weights():
    fold = Fold(kinds=[(0,)], layers=2, width=20)
    for first, second in zip(fold.run(), fold.run()):
        assert torch.equal(first, second)
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
    assert [launch.name for launch in recorded] == [
        "fold_chains",
        "fold_prepare",
        "fold_backward",
        "fold_chains_backward",
    ]
    assert launches.total() == 4
    # 3 towers with more than 44 tasks each give work to all 132 multiprocessors of a GPU.
    assert all(launch.grid[0] == 3 and launch.grid[1] > 44 for launch in recorded)
    assert {pair.composites.dtype, pair.projected_up.dtype, pair.projection_operands.dtype} == {dtype}


def test_refusals():
    meta = side_weights([(0,), (1,)])
    flat = in_buffer(meta, torch.empty(flat_size(meta)))
    assert refusal(flat) == ""
    assert refusal(side_weights([(0,)], dim=160)) == "it needs at most 128 dimensions of an item vector, found 160"
    assert refusal(side_weights([(0,)], layers=32)) == "it needs at most 31 layers, found 32"
    assert refusal(flat.mapped(torch.Tensor.double)) == "it needs weights of float32, found float64"
    unlike = meta._replace(towers=[meta.towers[0], side_weights([(1,)], gated=False).towers[0]])
    assert refusal(unlike) == "it needs towers of one shape, all with gates or none"
    apart = flat.mapped(torch.clone)
    with pytest.raises(ValueError, match="expected weights that are views of one flat buffer"):
        FoldHeads(apart, apart, apart, torch.float32)
    with pytest.raises(ValueError, match="towers of one shape"):
        FoldHeads(unlike, unlike, unlike, torch.float32)
    with pytest.raises(ValueError, match="found bfloat16 with operands of float32"):
        FoldHeads(flat, flat, flat, torch.bfloat16)
    other = in_buffer(meta, torch.empty(flat_size(meta) + 64)[64:])
    FoldHeads(flat, flat, other, torch.float32)  # a layout is relative to the first weight
    with pytest.raises(ValueError, match="expected gradients laid out as the weights are"):
        FoldHeads(flat, flat, other._replace(heads=other.heads[::-1]), torch.float32)


@pytest.mark.parametrize("method", ["iisan", "iisan-versa"])
def test_a_models_weights_in_flat_storage(method):
    """The outputs are those of the towers' differentiable operands and of the heads' own folding."""
    config = ModelConfig(method=method, embedding_dim=16, bottleneck=5)
    model = side_recommender([(2, 20), (2, 20)], config, 10, np.full(9, 0.1), seed=1).to(DEVICE)
    storage = FlatStorage(model, dict.fromkeys(model.parameter_groups(), 1e-3))
    storage.parameters += torch.randn_like(storage.parameters) / 8
    weights = storage.weights()
    pair = FoldHeads(weights, storage.operands(), storage.gradients(), torch.float32)
    pair.forward()
    views = [sum(1 << i for i, tower in enumerate(weights.towers) if view in tower.views) for view in (0, 1)]
    coefficients, _, bias, composites, up, up_bias = tower_operands(weights.towers, *views, torch.float32)
    folded, heads_bias = model.item_encoder.heads.folded()
    projections = torch.stack(list(folded.values()))
    projected_up = torch.einsum("tkrd,ted->tkre", up, projections)
    vector_bias = heads_bias + torch.einsum("td,ted->e", up_bias, projections)
    expected = (coefficients, bias, composites, projected_up, projections, vector_bias)
    for name, tensor in zip(OUTPUTS, expected):
        torch.testing.assert_close(getattr(pair, name), tensor.detach(), rtol=1e-4, atol=1e-5, msg=name)
