"""Checks of captured training steps, on a GPU or on a CPU with a stand-in for the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.datasets import make_sequences
from helpers.stores import fill_store
from helpers.tables import random_table
from helpers.training_steps import assert_identical, everything
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.batches import Shape, epoch_batches
from iisan_fast.data.sequences import Sequences
from iisan_fast.precision import resolve_precision
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.loader import PreparedBatch
from iisan_fast.training.trainer import Trainer

WARM_UP_EPOCHS = 5  # each shape of the epochs that are compared comes in one of these
COMPARED_EPOCHS = 3
USERS, ITEMS, SHAPES = 250, 600, [(3, 48), (3, 48)]
CONFIG = RunConfig(
    "",
    "",
    ("image", "title"),
    model=ModelConfig(embedding_dim=32, bottleneck=16),
    train=TrainConfig(batch_users=64, precision="float32"),
)


@contextmanager
def new_trainer(folder: Path, device: torch.device, placement: str = "device") -> Iterator[Trainer]:
    """250 users, four batches an epoch, the last one smaller."""
    sequences = make_data()
    if not (cache := folder / "cache").exists():
        fill_store(cache, sequences.item_ids, random_table(SHAPES, ITEMS, torch.float32), CONFIG.views)
    with closing(load_table(cache, CONFIG.views, sequences.item_ids, device, placement, torch.float32)) as table:
        trainer = Trainer(CONFIG, sequences, table, device, resolve_precision(CONFIG, device))
        trainer.model.train()
        yield trainer


def make_data() -> Sequences:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(5, 14, USERS)]
    return make_sequences(histories, items=ITEMS)


def train_epochs(trainer: Trainer, epochs: int, first: int = 0) -> list[float]:
    """The loss of each step."""
    losses = []
    for epoch in range(first, first + epochs):
        losses += [trainer.take(each).clone() for each in trainer.batches(epoch)]
    return [loss.item() for loss in losses]


def check_captured_equals_eager(eager: Trainer, captured: Trainer) -> None:
    """20 steps of five epochs. In fp32, so what differs is the order in which products are added up."""
    start = everything(eager.step)
    eager.captured = None  # and so its batches are not padded
    losses, replayed = train_epochs(eager, 5), train_epochs(captured, 5)
    assert len(losses) == 20 and 2 <= len(captured.captured._captured) < 20
    np.testing.assert_allclose(replayed, losses, rtol=1e-4)
    ends = [everything(trainer.step) for trainer in (eager, captured)]
    for name, before in start.items():
        moved, difference = ends[0][name] - before, ends[1][name] - ends[0][name]
        assert difference.norm() <= 5e-3 * moved.norm(), name
    sums = [trainer.step.read() for trainer in (eager, captured)]
    assert sums[0].rows == sums[1].rows and sums[0].failed_step is sums[1].failed_step is None
    assert sums[0].loss == pytest.approx(sums[1].loss, rel=1e-4)


def capture_without_trace(trainer: Trainer, each: PreparedBatch) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """(what replays a step on this batch, what Adam keeps that it did not before)."""
    before, record = everything(trainer.step), trainer.step.record.clone()
    packed = each.batch.packed() if each.batch.buffer is None else each.batch.buffer  # none on a CPU
    *_, replay = trainer.captured._prepare(packed, each.batch.shape, each.item_inputs)
    after = everything(trainer.step)
    new = {name: after.pop(name) for name in after.keys() - before.keys()}
    assert_identical(after, before)
    assert torch.equal(trainer.step.record.view(torch.int64), record.view(torch.int64))
    return replay, new


def check_a_capture_leaves_no_trace(trainer: Trainer) -> None:
    """Neither before the first step, when it makes Adam's state, nor later, nor once the flag is set."""
    first, *others = trainer.batches(0)
    replay, new = capture_without_trace(trainer, first)
    assert new and not any(value.any() for value in new.values())
    before = everything(trainer.step)
    replay()  # whereas a replay does count
    assert trainer.step.record[1] == first.rows
    assert all(not torch.equal(value, before[name]) for name, value in everything(trainer.step).items())
    for each in others:
        trainer.take(each)
    assert not capture_without_trace(trainer, others[-1])[1]
    trainer.step.record[2:] = torch.tensor([2, float("nan")], device=trainer.device)
    assert not capture_without_trace(trainer, others[-1])[1]


def check_a_loss_that_is_not_finite_stops_replayed_graphs(trainer: Trainer) -> None:
    train_epochs(trainer, 1)
    trainer.step.read()
    before = everything(trainer.step)
    states = trainer.source.views[0].clone()
    trainer.source.views[0].fill_(float("nan"))
    assert np.isnan(train_epochs(trainer, 1)).all()  # the same batches again
    trainer.source.views[0].copy_(states)
    assert np.isfinite(train_epochs(trainer, 1)).all()
    assert_identical(everything(trainer.step), before)
    found = trainer.step.read()
    assert found.failed_step == 1 and found.rows == 0 and np.isnan(found.failed_loss)


def shapes_of(trainer: Trainer, epoch: int) -> tuple[Shape, ...]:
    """Return the padded shapes of an epoch's batches, in order."""
    config = trainer.config.train
    batches = epoch_batches(trainer.sequences, config.batch_users, config.seed, epoch)
    return tuple(trainer.padded_shape(batch.shape) for batch in batches)


def epochs_to_compare(trainer: Trainer) -> list[int]:
    """Return epochs after the warm-up that all have the same shapes, in the same order, and no new one."""
    known = {shape for epoch in range(WARM_UP_EPOCHS) for shape in shapes_of(trainer, epoch)}
    later = {epoch: shapes_of(trainer, epoch) for epoch in range(WARM_UP_EPOCHS, 100)}
    counts = Counter(shapes for shapes in later.values() if known.issuperset(shapes))
    ((commonest, _),) = counts.most_common(1)
    epochs = [epoch for epoch, shapes in later.items() if shapes == commonest][:COMPARED_EPOCHS]
    assert len(epochs) == COMPARED_EPOCHS
    return epochs


def check_memory_does_not_grow(trainer: Trainer, start: Callable[[], None], read: Callable[[], list[int]]) -> None:
    """`read` gives the same figures after each of several epochs, once every shape of theirs is captured.

    A new shape takes memory for its graph, so no epoch that brings one is compared. `start` is called before an epoch.
    """
    train_epochs(trainer, WARM_UP_EPOCHS)
    captured, readings = set(trainer.captured._captured), []
    for epoch in epochs_to_compare(trainer):
        start()
        for each in trainer.batches(epoch):
            trainer.take(each)
        trainer.step.read()
        readings.append(read())
    assert trainer.captured._captured.keys() == captured
    assert all(reading == readings[0] for reading in readings), readings
