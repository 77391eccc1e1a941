"""SASRec in Triton against the reference: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import pytest
import torch

from helpers.sequence_cases import PairCase

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_pair_of_one_block_on_packed_tiles(dropout):
    """Seven users in two of three tiles, one row alone, rows that are none between and behind them."""
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
        dict(rows_of_users=[20, 17, 2], positions=20, tile_rows=32),
        dict(rows_of_users=[50, 3], tile_rows=64, blocks=1),
        dict(rows_of_users=[16, 16, 16, 1], spare=(3, 0, 2)),
    ],
    ids=str,
)
def test_the_pair_of_other_sizes(sizes):
    PairCase(**sizes).check()


@pytest.mark.slow
def test_equal_steps_give_equal_bits():
    case = PairCase([3, 9, 5, 4])
    first, second = case.run(), case.run()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name
