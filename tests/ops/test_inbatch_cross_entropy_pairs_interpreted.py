"""The loss's pairs of the GPU's step, on packed batches, against the reference by autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from helpers.loss_cases import LossPairCase
from iisan_fast.kernels.gpu import configurations
from iisan_fast.kernels.gpu.inbatch_cross_entropy import InbatchCrossEntropy
from iisan_fast.kernels.gpu.launch import Launch, launches, recording

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def test_pairs_on_packed_tiles_with_gaps():
    """Seven users in two of three tiles, one row alone, spare columns and users."""
    LossPairCase([3, 5, 1, 9]).check()


def test_an_item_of_many_occurrences():
    LossPairCase([5] * 12, items=3, spare=(0, 0, 0)).check()


def test_items_of_the_users_count_where_no_history_bit_is_set():
    case = LossPairCase([3, 5, 1, 9], items=12)
    case.batch.history_bits.zero_()
    case.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(rows_of_users=[1], items=1),
        dict(rows_of_users=[1], items=63, spare=(0, 0, 0)),
        dict(rows_of_users=[7, 3, 10, 2, 9, 9] * 5, items=507),
        dict(rows_of_users=[2, 4], d=128),
        dict(rows_of_users=[10] * 9, items=90, d=64, spare=(3, 2, 5)),
        dict(rows_of_users=[20, 17, 2], tile_rows=32, items=33),
        dict(rows_of_users=[50, 3], tile_rows=64, items=300),
        dict(rows_of_users=[9, 2, 6], scale=300.0),
    ],
    ids=str,
)
def test_pairs_of_other_sizes(sizes):
    LossPairCase(**sizes).check()


def test_equal_steps_give_equal_bits_after_other_steps():
    """Run a larger batch and then a smaller one in one memory."""
    case = LossPairCase([3, 9, 5, 4, 1], items=60)
    pairs = case.pairs()
    first = case.run(pairs)
    header = pairs[0].batch.header
    true_header = header.clone()
    header[:3] = torch.tensor([case.shape.distinct, case.shape.rows, case.shape.tiles])
    case.run(pairs)
    header.copy_(true_header)
    for name, values in case.run(pairs).items():
        assert torch.equal(values, first[name]), name


def test_an_empty_batch_is_not_read():
    """Check that an empty batch reads no vector: the calls before a capture run on one."""
    loss, collect = LossPairCase([3, 5]).pairs()
    loss.batch.header.zero_()
    loss.item_parts.fill_(torch.nan)
    for run in (loss.forward, loss.backward, collect.backward):
        run()
    assert loss.item_parts.isnan().all() and not collect.of_vectors.any() and not loss.losses.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_launches_four_kernels_and_allocates_nothing(dtype):
    case = LossPairCase([3, 5], d=64)
    pairs = case.pairs(dtype, "meta")
    recorded: list[Launch] = []
    launches.clear()
    with recording(recorded.append), configurations.as_architecture("sm_90"), torch.profiler.profile() as profile:
        for run in (pairs[0].forward, pairs[0].backward, pairs[1].backward):
            run()
    names = ["loss_forward", "loss_query_gradients", "loss_item_gradients", "item_vector_gradients"]
    assert [launch.name for launch in recorded] == names and launches == dict.fromkeys(names, 1)
    assert not [event.key for event in profile.key_averages() if event.key.startswith("aten::")]


@pytest.mark.parametrize("size", ["small", "large", "wide"])
def test_pairs_in_the_tiles_of_other_configurations(size, monkeypatch):
    monkeypatch.setattr(configurations, "size_of", lambda *arguments: size)
    with configurations.as_architecture("sm_90"):
        LossPairCase([7, 3, 10, 2, 9, 9, 5], items=300).check()


def test_an_embedding_dim_without_kernels_is_refused():
    with pytest.raises(ValueError, match="embedding dimension: expected one of .*, found 48"):
        LossPairCase([3], d=48).pairs()


def test_operands_of_another_dtype_are_refused():
    case = LossPairCase([3])
    loss, _ = case.pairs()
    with pytest.raises(ValueError, match="operands: expected torch.float16, found states of torch.float32"):
        InbatchCrossEntropy(
            case.states, case.vectors, loss.batch, case.bias, case.log2_p, case.shape, dtype=torch.float16
        )
