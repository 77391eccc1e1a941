"""The memory of a run's batches on several ranks, each of which takes a share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.rank_steps import ITEMS, PLAIN, SMALL, Case, model_and_data, source_of
from iisan_fast.config import RunConfig, TrainConfig
from iisan_fast.data.batches import padded_shape
from iisan_fast.data.loss_columns import Negatives
from iisan_fast.errors import InputError
from iisan_fast.ranks import ALONE, Ranks
from iisan_fast.training import memory_budget
from iisan_fast.training.memory_budget import MemoryBudget

OF_AN_ITEM = 4 * 3 * 2 * 2 * 32  # bytes: three copies of two views of 2 x 32 numbers


class FourRanks(Ranks):
    """The second of four ranks on two machines, without the others."""

    def from_all(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


FOUR = FourRanks(rank=1, count=4, on_this_machine=2)


def budget(train: TrainConfig, ranks: Ranks) -> MemoryBudget:
    """Return the budget of a small model."""
    case = Case(train=train)
    config = RunConfig("", "", ("image", "title"), model=SMALL, train=train)
    model, sequences = model_and_data(case)
    return MemoryBudget(config, sequences, source_of(case), model, torch.device("cpu"), ranks)


def test_a_rank_takes_memory_for_the_items_that_it_encodes():
    assert budget(PLAIN, ALONE).estimate == ITEMS * OF_AN_ITEM
    assert budget(PLAIN, FOUR).estimate == ITEMS // 4 * OF_AN_ITEM


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_rank_takes_memory_for_the_scores_of_its_rows_and_half_of_the_machine(monkeypatch, lacking):
    train = TrainConfig(batch_users=7, loss="full")
    model, sequences = model_and_data(Case(train=train))
    shape = padded_shape(sequences, 7, Negatives.of(train), FOUR)
    assert shape.rows == padded_shape(sequences, 2).rows
    columns = min(shape.distinct, ITEMS)
    needed = -(-columns // 4) * OF_AN_ITEM + 4 * shape.rows * columns
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: 2 * needed - lacking)
    if lacking:
        with pytest.raises(InputError, match=f"loss: full compares up to {shape.rows} rows with {columns} items"):
            budget(train, FOUR)
    else:
        assert budget(train, FOUR).estimate == needed
