"""Check the optimizer step: the flag that stops it, its sums, and its captured form with a stand-in for the graph.

test_training_step_gpu.py has the tests that need a GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from helpers.training_steps import assert_identical, everything
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, epoch_batches, padded_shape
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import States
from iisan_fast.ranks import Ranks
from iisan_fast.states.feature_table import FeatureTable, PinnedTable
from iisan_fast.states.loader import PreparedBatch, prepared_batches
from iisan_fast.training.training_step import CapturedStep, Reading, TrainingStep

CPU = torch.device("cpu")
USERS, ITEMS, BATCH_USERS = 90, 160, 20
NAN, INF = float("nan"), float("inf")


def make_data() -> tuple[Sequences, FeatureTable]:
    """Return 90 users, so that a batch of 20 has about a hundred rows and the last batch has half of the users."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(5, 14, USERS)]
    return make_sequences(histories, items=ITEMS), random_table([(2, 6), (2, 6)], ITEMS)


def make_step(sequences: Sequences, table: FeatureTable) -> TrainingStep:
    popularity = np.maximum(sequences.popularity, 1e-4)
    model = side_recommender(
        table.shapes, ModelConfig(embedding_dim=8, bottleneck=4), sequences.max_inputs, popularity, 1
    )
    model = model.double().train()
    return TrainingStep(model, dict.fromkeys(model.parameter_groups(), 1e-3), CPU)


def batches(sequences: Sequences, table, epochs: int = 1, padded: bool = False) -> list[PreparedBatch]:
    shape = padded_shape(sequences, BATCH_USERS) if padded else None
    return [
        prepared
        for epoch in range(epochs)
        for prepared in prepared_batches(epoch_batches(sequences, BATCH_USERS, 0, epoch), table, CPU, shape)
    ]


def poison(step: TrainingStep, factors: dict[int, float], monkeypatch) -> None:
    """Multiply the loss of these steps, and so every gradient, by a factor."""
    original = step.model.loss

    def loss(batch, states, ranks) -> Tensor:
        return original(batch, states, ranks) * factors.get(int(batch.step), 1.0)

    monkeypatch.setattr(step.model, "loss", loss)


# The flag


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_nothing_is_updated_from_a_loss_on_that_is_not_finite(first, factor, monkeypatch):
    sequences, table = make_data()
    step = make_step(sequences, table)
    poison(step, {first: factor}, monkeypatch)
    before = everything(step)
    for done, prepared in enumerate(batches(sequences, table)):
        loss = step(prepared.batch, prepared.item_inputs)
        assert loss.isfinite() == (done != first)
        if done < first:
            before = everything(step)
        elif done == 0:  # this step has made Adam's state
            current = everything(step)
            assert all(not value.any() for name, value in current.items() if name not in before)
            before = {**current, **before}
        assert_identical(everything(step), before)
    assert done == 4
    counters = [value for name, value in before.items() if name.startswith("step of ")]
    assert counters and all(count == first for count in counters)
    reading = step.read()
    assert reading.failed_step == first + 1
    assert math.isnan(reading.failed_loss) if math.isnan(factor) else reading.failed_loss == factor


def test_gradients_that_are_not_finite_do_not_pass_by_a_flag(monkeypatch):
    """The failing step computes gradients of its loss, but does not update the weights."""
    sequences, table = make_data()
    step = make_step(sequences, table)
    poison(step, {0: NAN}, monkeypatch)
    (prepared, *_) = batches(sequences, table)
    step(prepared.batch, prepared.item_inputs)
    assert any(parameter.grad.isnan().any() for parameter in step.model.parameters())
    assert all(parameter.isfinite().all() for parameter in step.model.parameters())


def test_the_first_failing_step_is_the_one_that_is_told(monkeypatch):
    sequences, table = make_data()
    step = make_step(sequences, table)
    poison(step, {1: -INF, 2: NAN, 4: INF}, monkeypatch)
    for prepared in batches(sequences, table)[:3]:
        step(prepared.batch, prepared.item_inputs)
    first = step.read()
    assert (first.failed_step, first.failed_loss) == (2, -INF)
    for prepared in batches(sequences, table)[3:]:
        step(prepared.batch, prepared.item_inputs)
    assert step.read() == Reading(0.0, 0, 2, -INF)  # the failed step stays in the record, the sums start at 0


# The sums


@pytest.mark.parametrize("padded", [False, True])
def test_the_sums_are_those_of_the_steps_since_the_last_reading(padded):
    sequences, table = make_data()
    step = make_step(sequences, table)
    assert step.read() == Reading(0.0, 0, None, 0.0)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        total = 0.0
        rows = 0
        for prepared in batches(sequences, table, padded=padded)[part]:
            total += step(prepared.batch, prepared.item_inputs).item() * prepared.rows
            rows += prepared.rows
        reading = step.read()
        assert reading.rows == rows > 0 and reading.failed_step is None
        assert reading.loss == pytest.approx(total, rel=1e-12)


def test_sums_end_before_the_step_that_fails(monkeypatch):
    sequences, table = make_data()
    step = make_step(sequences, table)
    poison(step, {2: NAN}, monkeypatch)
    taken = batches(sequences, table)
    losses = [step(prepared.batch, prepared.item_inputs).item() for prepared in taken]
    reading = step.read()
    assert reading.rows == taken[0].rows + taken[1].rows
    assert reading.loss == pytest.approx(losses[0] * taken[0].rows + losses[1] * taken[1].rows, rel=1e-12)


def test_the_returned_loss_carries_no_graph():
    sequences, table = make_data()
    (prepared, *_) = batches(sequences, table)
    assert not make_step(sequences, table)(prepared.batch, prepared.item_inputs).requires_grad


# The captured form


@pytest.mark.parametrize("gathered", [False, True])
def test_a_captured_step_trains_as_the_step_alone(gathered):
    sequences, table = make_data()
    source = PinnedTable(table.views, CPU) if gathered else table
    alone, taken = make_step(sequences, table), make_step(sequences, table)
    captures = []
    captured = CapturedStep(taken, capture=lambda run: captures.append(run) or run)
    for unpadded, padded in zip(batches(sequences, table, 3), batches(sequences, source, 3, padded=True), strict=True):
        expected = alone(unpadded.batch, unpadded.item_inputs)
        torch.testing.assert_close(captured(padded.batch, padded.item_inputs), expected, rtol=1e-10, atol=0)
    assert len(captures) == 1
    theirs = everything(alone)
    assert set(everything(taken)) == set(theirs)
    for name, value in everything(taken).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-7, atol=1e-10, msg=name)
    first, second = alone.read(), taken.read()
    assert first.rows == second.rows and first.loss == pytest.approx(second.loss, rel=1e-10)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_captured_step_runs_on_buffers_of_its_own(gathered, monkeypatch):
    """The tensors of one step may be freed or overwritten before the next, so a graph cannot read them."""
    sequences, table = make_data()
    source = PinnedTable(table.views, CPU) if gathered else table
    step = make_step(sequences, table)
    addresses = []
    loss = step.model.loss

    def noted(batch: Batch, states: list[States], ranks: Ranks) -> Tensor:
        addresses.append((batch.buffer.data_ptr(), *(view.table.data_ptr() for view in states)))
        return loss(batch, states, ranks)

    monkeypatch.setattr(step.model, "loss", noted)
    captured = CapturedStep(step, capture=lambda run: run)
    (prepared, *_) = batches(sequences, source, padded=True)
    from_device = Batch.unpacked(prepared.batch.packed(), prepared.batch.shape)
    for batch in (prepared.batch, from_device, prepared.batch):
        captured(batch, prepared.item_inputs)
    assert len(addresses) == 3 and len(set(addresses)) == 1
    assert from_device.buffer.data_ptr() not in addresses[0]
    assert all((view.table.data_ptr() in addresses[0]) == (not gathered) for view in prepared.item_inputs)


def test_a_batch_of_another_shape_is_refused():
    sequences, table = make_data()
    captured = CapturedStep(make_step(sequences, table), capture=lambda run: run)
    first, second = batches(sequences, table, padded=True)[:2]
    captured(first.batch, first.item_inputs)
    shape = second.batch.shape
    larger = second.batch.padded(shape._replace(users=shape.users + 1))
    with pytest.raises(ValueError, match="batch: expected the captured Shape"):
        captured(larger, second.item_inputs)


def test_a_flag_stops_the_captured_form_as_well(monkeypatch):
    sequences, table = make_data()
    step = make_step(sequences, table)
    poison(step, {2: NAN}, monkeypatch)
    captured = CapturedStep(step, capture=lambda run: run)
    for prepared in batches(sequences, table, padded=True):
        captured(prepared.batch, prepared.item_inputs)
        if prepared.batch.step == 1:
            before = everything(step)
    assert_identical(everything(step), before)
    assert step.read().failed_step == 3
