"""The step on a GPU: graphs that train as eager steps do, captures that leave no trace, no wait, no growth.

The bodies take a trainer, so that a CPU can run them with a stand-in for the graph.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_store, make_sequences, random_table
from test_feature_table import untimed
from test_training_step import assert_identical, everything
from torch import Tensor

from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.batches import epoch_batches
from iisan_fast.data.sequences import Sequences
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.loader import Prepared
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.trainer import Trainer, deterministic, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CUDA = torch.device("cuda")
USERS, ITEMS, SHAPES = 250, 600, [(3, 48), (3, 48)]
CONFIG = RunConfig(
    "",
    "",
    ("image", "title"),
    model=ModelConfig(embedding_dim=32, bottleneck=16),
    train=TrainConfig(batch_users=64, precision="float32"),
)
PLACEMENTS = ("device", "pinned", "mapped")
LIVE = ("requested_bytes.all.current", "requested_bytes.all.peak")

each_placement = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """As in a run; each test finds the GPU's memory free."""
    with deterministic():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def new_trainer(folder: Path, device: torch.device, placement: str = "device") -> Iterator[Trainer]:
    """250 users, four batches an epoch, the last one smaller."""
    sequences = make_data()
    if not (cache := folder / "cache").exists():
        fill_store(cache, sequences.item_ids, random_table(SHAPES, ITEMS, torch.float32), CONFIG.views)
    with closing(load_table(cache, CONFIG.views, sequences.item_ids, device, placement, torch.float32)) as table:
        trainer = Trainer(CONFIG, sequences, table, device)
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


# Captured and eager


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


@each_placement
def test_replayed_graphs_train_as_eager_steps_do(tmp_path, placement):
    with new_trainer(tmp_path, CUDA) as eager, new_trainer(tmp_path, CUDA, placement) as captured:
        check_captured_equals_eager(eager, captured)


def capture_without_trace(trainer: Trainer, each: Prepared) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """(what replays a step on this batch, what Adam keeps that it did not before)."""
    before, record = everything(trainer.step), trainer.step.record.clone()
    packed = each.batch.packed() if each.batch.buffer is None else each.batch.buffer  # none on a CPU
    *_, replay = trainer.captured._prepare(packed, each.batch.shape, each.states)
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


@each_placement
def test_a_capture_leaves_no_trace(tmp_path, placement):
    with new_trainer(tmp_path, CUDA, placement) as trainer:
        check_a_capture_leaves_no_trace(trainer)


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


def test_a_loss_that_is_not_finite_stops_replayed_graphs(tmp_path):
    with new_trainer(tmp_path, CUDA) as trainer:
        check_a_loss_that_is_not_finite_stops_replayed_graphs(trainer)


def test_a_capture_bears_a_thread_that_pins_memory(tmp_path):
    """As the loader's does for a table that the device does not hold."""
    stop, pinned = threading.Event(), []

    def pin() -> None:
        while not stop.is_set() and len(pinned) < 4000:
            pinned.append(torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True))

    with new_trainer(tmp_path, CUDA) as trainer:
        taken = list(trainer.batches(0))
        thread = threading.Thread(target=pin)
        thread.start()
        try:
            losses = [trainer.take(each).item() for each in taken]
        finally:
            stop.set()
            thread.join()
        assert pinned and np.isfinite(losses).all() and trainer.step.read().failed_step is None


# No wait for the device


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["captured", "eager"])
@each_placement
def test_nothing_waits_for_the_device_within_an_epoch(tmp_path, placement, form):
    with new_trainer(tmp_path, CUDA, placement) as trainer:
        if form == "eager":
            trainer.captured = None
        train_epochs(trainer, 1)  # kernels are compiled, graphs captured
        trainer.step.read()
        with no_synchronisation():
            with pytest.raises(RuntimeError, match="synchroniz"):
                trainer.step.record.tolist()
            for each in trainer.batches(0):
                trainer.take(each)
        assert trainer.step.read().rows == sum(len(each.targets) for each in epoch_batches(make_data(), 64, 0, 0))


# Repeatability


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_runs_repeat_bit_for_bit_wherever_the_table_lies(tmp_path, toy_run, precision):
    dataset, cache = toy_run
    config = dataclasses.replace(
        CONFIG,
        dataset=str(dataset),
        cache=str(cache),
        train=TrainConfig(batch_users=16, max_epochs=3, precision=precision),
    )
    runs = [tmp_path / name for name in ("device", "again", "pinned", "mapped")]
    results = [train(config, run, CUDA, placement="device" if run.name == "again" else run.name) for run in runs]
    assert all(result == results[0] for result in results)
    assert all(untimed(run) == untimed(runs[0]) for run in runs) and len(untimed(runs[0])) == 3
    for name in ("best.safetensors", "last.safetensors"):
        first, *others = (load_checkpoint(run / name)[0] for run in runs)
        for other in others:
            assert_identical(other, first)


# Memory


@each_placement
def test_memory_does_not_grow_over_epochs(tmp_path, placement):
    """What is asked for, at its peak and at the end, and the streams it is kept for, which give each other nothing."""
    seen = []
    with new_trainer(tmp_path, CUDA, placement) as trainer:
        for _ in range(6):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            for each in trainer.batches(0):
                trainer.take(each)
            trainer.step.read()
            stats = torch.cuda.memory_stats()
            streams = {segment["stream"] for segment in torch.cuda.memory_snapshot()}
            seen.append([*(stats[name] for name in LIVE), len(streams)])
    assert all(found == seen[2] for found in seen[3:]), seen
