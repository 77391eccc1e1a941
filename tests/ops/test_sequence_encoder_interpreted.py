"""SASRec in Triton against the reference: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.kernel_cases import DEVICE, strided
from helpers.recommenders import side_recommender
from helpers.sequence_cases import EPSILON, GridCase, PairCase, sequence_by_gpu
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.kernels import SequenceGrid, SequenceWeights
from iisan_fast.kernels.gpu import launch
from iisan_fast.kernels.gpu.configurations import as_architecture
from iisan_fast.kernels.gpu.sequence_encoder import EncoderSizes, flat_view, refusal
from iisan_fast.kernels.reference import sequence_encoder as sequence_encoder_reference
from iisan_fast.training.flat_storage import FlatStorage

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.25])
def test_the_pair_of_one_block_on_packed_tiles(dropout):
    """Run four users in two of three tiles, one of them with a single row, with padding rows between and after."""
    PairCase([3, 5, 1, 9], blocks=1, dropout=dropout, spare=(1, 1, 1)).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(rows_of_users=[1]),
        dict(rows_of_users=[7, 3, 10, 2, 9, 9], blocks=3),
        dict(rows_of_users=[2, 4], d=128, blocks=1),
        dict(rows_of_users=[2, 4], d=64, heads=1, blocks=1),
        dict(rows_of_users=[2, 4], heads=4, blocks=1),
        dict(rows_of_users=[2, 4, 11], d=64, heads=8, blocks=1),
        dict(rows_of_users=[20, 17, 2], positions=21, tile_rows=32),
        dict(rows_of_users=[50, 3], tile_rows=64, blocks=1),
        dict(rows_of_users=[16, 16, 16, 1], spare=(3, 0, 2)),
    ],
    ids=str,
)
def test_the_pair_of_other_sizes(sizes):
    PairCase(**sizes).check()


@pytest.mark.slow
def test_all_blocks_in_one_launch_give_what_a_launch_for_each_half_gives(monkeypatch):
    """Take the configurations of bf16 products, in fp32, since the interpreter cannot multiply bf16."""
    case = PairCase([3, 9, 5, 4])
    halves = case.run()
    monkeypatch.setattr("iisan_fast.kernels.gpu.configurations.size_of", lambda *_: "small")
    with as_architecture("sm_90"):
        launch.launches.clear()
        whole = case.run()
    assert launch.launches["sequence_forward"] == launch.launches["sequence_backward"] == 1
    for name, values in whole.items():
        torch.testing.assert_close(values, halves[name], rtol=1e-5, atol=1e-5)
    case.check()


@pytest.mark.slow
def test_equal_steps_give_equal_bits():
    case = PairCase([3, 9, 5, 4])
    first, second = case.run(), case.run()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


@pytest.mark.parametrize(("tile_rows", "users"), [(16, 64), (32, 8192)])
def test_a_step_has_one_launch_forward_and_three_backward(tile_rows, users):
    """Count launches on meta tensors, which hold no values."""
    case = PairCase([3, 9, 5], d=64, tile_rows=tile_rows, spare=(0, 0, users * 4 // tile_rows))
    recorded = []
    with as_architecture("sm_90"), launch.recording(lambda launched: recorded.append(launched.name)):
        pair = case.pair(torch.bfloat16, "meta")
        pair.forward()
        pair.backward()
    assert recorded == ["sequence_forward", "sequence_backward", "sequence_weight_gradients", "sum_parts"]
    assert pair.state_operands.dtype == torch.bfloat16 and pair.states.dtype == torch.float32


def test_weights_that_do_not_follow_one_another_are_refused():
    tensors = [torch.zeros(2, 32), torch.zeros(32)]
    with pytest.raises(ValueError, match="expected views one after the other, tensor 1 is not"):
        flat_view(tensors)


@pytest.mark.parametrize("d", [32, 64, 128])
def test_the_weights_of_flat_storage_lie_as_the_kernels_read_them(d):
    config = ModelConfig(embedding_dim=d, bottleneck=8, blocks=3)
    model = side_recommender([(2, 16), (2, 16)], config, max_inputs=7, popularity=np.full(9, 1 / 8), seed=0)
    storage = FlatStorage(model, dict.fromkeys(model.parameter_groups(), 1e-3), torch.bfloat16)
    weights = storage.weights().sequence
    assert refusal(weights, 7) == ""
    sizes = EncoderSizes.of(weights, 16, None, torch.bfloat16)
    for buffer in (storage.weights(), storage.operands(), storage.gradients()):
        assert len(flat_view(buffer.sequence.tensors)) == sizes.weights


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(d=48), "it needs an embedding dimension of 32, 64, 128, found 48"),
        (dict(heads=8), "it needs 1 to 8 heads of at least 8, found 8 over 32"),
        (dict(positions=65), "it needs at most 64 positions, found 65"),
        (dict(blocks=0), "it needs blocks with a feed-forward of 128"),
        ({}, ""),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(changed, reason):
    sizes = dict(lengths=[1], d=32, heads=2, blocks=1) | {k: v for k, v in changed.items() if k != "positions"}
    case = GridCase(**sizes, spare=changed.get("positions", 1) - 1)
    weights = SequenceWeights(case.tensors, case.heads, EPSILON)
    assert refusal(weights, 1) == reason
    if reason:
        with pytest.raises(kernels.FormError, match=f"gpu cannot run sequence_encoder: {reason}"):
            sequence_by_gpu(case.x, weights, case.grid)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_op_on_a_grid(dtype):
    GridCase([3, 5, 1], spare=2, dtype=dtype).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(lengths=[1]),
        dict(lengths=[17, 4], d=64, heads=4),
        dict(lengths=[2, 40]),
        dict(lengths=[4, 3], d=128, blocks=2, dropout=0.0),
    ],
    ids=str,
)
def test_the_op_of_other_sizes(sizes):
    GridCase(**sizes).check()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[], [3, 2]])
def test_the_op_of_no_rows(lengths):
    """Run an empty batch, and a batch of users without rows."""
    case = GridCase(lengths)
    case.grid = case.grid._replace(slots=case.grid.slots[:0])
    case.x, case.gradient = case.x[:0], case.gradient[:0]
    states, of_x, *of_weights = case.run(sequence_by_gpu)
    assert states.shape == of_x.shape == (0, 32)
    assert all(not gradient.any() for gradient in of_weights)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(0,), (1,), (4, 9), (2, 12, 15)])
def test_any_of_the_gradients(wanted):
    GridCase([3, 5]).check(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["expanded", "strided"])
def test_gradients_and_inputs_of_any_stride(gradient):
    case = GridCase([3, 5])
    shape = case.x.shape
    case.gradient = torch.ones((), device=DEVICE).expand(shape) if gradient == "expanded" else strided(case.gradient)
    case.check()
    weights = SequenceWeights([strided(tensor) for tensor in case.tensors], case.heads, EPSILON)
    grid = case.grid._replace(slots=strided(case.grid.slots))
    states = sequence_by_gpu(strided(case.x), weights, grid, case.dropout)
    assert torch.equal(states, case.run(sequence_by_gpu)[0])


@pytest.mark.slow
def test_rows_that_share_a_slot_disturb_nobody_else():
    """Padding rows of a batch share a slot of one extra user; their gradients are 0."""
    case = GridCase([3, 5, 4])
    padding = 6
    expected = case.run(sequence_by_gpu)
    count = len(case.x)
    last = torch.full((padding,), 4 * case.grid.length - 1, device=DEVICE)
    case.grid = SequenceGrid(torch.cat([case.grid.slots, last]), 4, case.grid.length)
    case.dropout = case.dropout._replace(users=torch.cat([case.dropout.users, case.dropout.users[:1]]))
    case.x, case.gradient = (
        torch.cat([values, fill * torch.ones_like(values[:padding])])
        for values, fill in ((case.x, 1), (case.gradient, 0))
    )
    states, of_x, *of_weights = case.run(sequence_by_gpu)
    assert torch.equal(states[:count], expected[0]) and torch.equal(of_x[:count], expected[1])
    assert not of_x[count:].any()
    for ours, theirs in zip(of_weights, expected[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_the_prefix_of_the_dropout_may_lie_on_the_device():
    case = GridCase([3, 5])
    expected = case.run(sequence_by_gpu)
    case.dropout = case.dropout._replace(prefix=torch.tensor(case.dropout.prefix, device=DEVICE))
    for ours, theirs in zip(case.run(sequence_by_gpu), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_states_after_whole_histories():
    case = GridCase([3, 5, 1], blocks=2, spare=1)
    weights = SequenceWeights(case.tensors, case.heads, EPSILON)
    ours = kernels.last_states(case.x, weights, case.grid, form="gpu")
    torch.testing.assert_close(ours, sequence_encoder_reference.last_states(case.x, weights, case.grid))
    case.x.requires_grad_()
    with pytest.raises(kernels.FormError, match="gpu cannot run last_states: it has no gradients"):
        kernels.last_states(case.x, weights, case.grid, form="gpu")


def test_without_a_backward_nothing_is_stored_for_it():
    case = GridCase([3, 5])
    stored = []
    with torch.no_grad(), launch.recording(lambda launched: stored.append(launched.meta["STORE"])):
        sequence_by_gpu(case.x, SequenceWeights(case.tensors, case.heads, EPSILON), case.grid)
    assert stored and not any(stored)
