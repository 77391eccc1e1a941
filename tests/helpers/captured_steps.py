"""Checks of captured training steps, on a GPU or on a CPU with a stand-in for the graph."""

from __future__ import annotations

import math
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
from iisan_fast.data.sequences import Sequences
from iisan_fast.precision import resolve_precision
from iisan_fast.states.feature_table import FeatureTable, load_table
from iisan_fast.states.loader import PreparedBatch
from iisan_fast.training.trainer import Trainer

WARM_UP_EPOCHS = 2
COMPARED_EPOCHS = 3
USERS = 250
ITEMS = 600
SHAPES = [(3, 48), (3, 48)]
NUMBER_BYTES, STATE_BYTES = 8, 4  # of an item's number, int64, and of one number of its states, fp32
CONFIG = RunConfig(
    "",
    "",
    ("image", "title"),
    model=ModelConfig(embedding_dim=32, bottleneck=16),
    train=TrainConfig(batch_users=64, precision="float32"),
)


@contextmanager
def new_trainer(folder: Path, device: torch.device, placement: str = "device") -> Iterator[Trainer]:
    """Return a trainer on 250 users, with four batches in an epoch, the last one smaller."""
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
    """Train some epochs and return the loss of each step."""
    losses = []
    for epoch in range(first, first + epochs):
        losses += [trainer.take(batch).clone() for batch in trainer.batches(epoch)]
    return [loss.item() for loss in losses]


def check_captured_equals_eager(eager: Trainer, captured: Trainer) -> None:
    """Check 20 steps of five epochs, captured and eager, in fp32: they differ only in the order of sums."""
    start = everything(eager.step)
    eager.step_by_autograd(captured=False)  # its batches are then not padded
    losses, replayed = train_epochs(eager, 5), train_epochs(captured, 5)
    assert len(losses) == 20
    np.testing.assert_allclose(replayed, losses, rtol=1e-4)
    ends = [everything(trainer.step) for trainer in (eager, captured)]
    for name, before in start.items():
        moved, difference = ends[0][name] - before, ends[1][name] - ends[0][name]
        assert difference.norm() <= 5e-3 * moved.norm(), name
    sums = [trainer.step.read() for trainer in (eager, captured)]
    assert sums[0].rows == sums[1].rows and sums[0].failed_step is sums[1].failed_step is None
    assert sums[0].loss == pytest.approx(sums[1].loss, rel=1e-4)


def capture_without_trace(trainer: Trainer, prepared: PreparedBatch) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """Capture a step on a batch, and check that no tensor changes.

    Returns the function that replays the step, and the tensors that Adam has since the capture, by name.
    """
    before = everything(trainer.step)
    record = trainer.step.record.clone()
    packed = prepared.batch.packed() if prepared.batch.buffer is None else prepared.batch.buffer  # none on a CPU
    replay = trainer.captured._capture_on_buffers(packed, prepared.batch.shape, prepared.item_inputs).run
    after = everything(trainer.step)
    new = {name: after.pop(name) for name in after.keys() - before.keys()}
    assert_identical(after, before)
    assert torch.equal(trainer.step.record.view(torch.int64), record.view(torch.int64))
    return replay, new


def check_a_capture_leaves_no_trace(trainer: Trainer) -> None:
    """Capture a step before the first step, after some steps, and after a failed one: no tensor may change."""
    first, *others = trainer.batches(0)
    replay, new = capture_without_trace(trainer, first)
    assert new and not any(value.any() for value in new.values())
    before = everything(trainer.step)
    replay()  # a replay changes them
    assert trainer.step.record[1] == first.rows
    assert all(not torch.equal(value, before[name]) for name, value in everything(trainer.step).items())
    for batch in others:
        trainer.take(batch)
    assert not capture_without_trace(trainer, others[-1])[1]
    trainer.step.record[2:] = torch.tensor([2, float("nan")], device=trainer.device)
    assert not capture_without_trace(trainer, others[-1])[1]


def check_preparing_leaves_no_trace(trainer: Trainer) -> None:
    """Capture the fused step before its first batch, and check that no tensor changes."""
    before = everything(trainer.step)
    record = trainer.step.record.clone()
    trainer.step.prepare()
    assert_identical(everything(trainer.step), before)
    assert torch.equal(trainer.step.record, record)
    first = next(trainer.batches(0))
    trainer.take(first)
    assert trainer.step.record[1] == first.rows
    assert all(not torch.equal(value, before[name]) for name, value in everything(trainer.step).items())


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
    record = trainer.step.read()
    assert record.failed_step == 1 and record.rows == 0 and np.isnan(record.failed_loss)


def check_memory_does_not_grow(trainer: Trainer, start: Callable[[], None], read: Callable[[], list[int]]) -> None:
    """Check that `read` returns the same numbers of bytes after each of several epochs, once the step is captured.

    `start` is called before an epoch. A thread copies the gathered rows of a fused step, as many as its batches have.
    So the numbers may differ by two batches between epochs; memory that grows would differ by many.
    """
    train_epochs(trainer, WARM_UP_EPOCHS)
    holder = trainer.step if trainer.captured is None else trainer.captured
    readings = []
    captured = holder._captured
    for epoch in range(WARM_UP_EPOCHS, WARM_UP_EPOCHS + COMPARED_EPOCHS):
        start()
        for batch in trainer.batches(epoch):
            trainer.take(batch)
        trainer.step.read()
        readings.append(read())
    assert holder._captured is captured
    room = 0
    if trainer.plan is not None and not isinstance(trainer.source, FeatureTable):
        item = NUMBER_BYTES + sum(math.prod(shape) * STATE_BYTES for shape in SHAPES)
        room = 2 * trainer.plan.shape.distinct * item
    assert all(max(values) - min(values) <= room for values in zip(*readings)), readings
