"""Check the step on a GPU: graphs train as eager steps do, leave no trace, never wait, and memory does not grow.

The checks take a trainer, so that a CPU can run them with a stand-in for the graph.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.captured_steps import (
    CONFIG,
    check_a_capture_leaves_no_trace,
    check_a_loss_that_is_not_finite_stops_replayed_graphs,
    check_captured_equals_eager,
    check_memory_does_not_grow,
    check_preparing_leaves_no_trace,
    make_data,
    new_trainer,
    train_epochs,
)
from helpers.run_folders import untimed
from helpers.training_steps import assert_identical
from iisan_fast.config import TrainConfig
from iisan_fast.data.batches import epoch_batches
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.determinism import deterministic
from iisan_fast.training.fused_step import GpuFusedStep
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CUDA = torch.device("cuda")
PLACEMENTS = ("device", "pinned", "mapped")
# Not the requested bytes: they count a freed tensor until other streams are done with it, which varies.
LIVE = ("allocated_bytes.all.current", "allocated_bytes.all.peak")

each_placement = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Make a test deterministic, as runs are, and free the GPU's memory after it."""
    with deterministic():
        yield
    gc.collect()
    torch.cuda.empty_cache()


# Captured and eager


@contextmanager
def trainer_by(form: str, folder: Path, placement: str = "device") -> Iterator[Trainer]:
    """Yield a trainer whose steps are "fused", or by autograd: "captured" or "eager"."""
    with new_trainer(folder, CUDA, placement) as trainer:
        assert isinstance(trainer.step, GpuFusedStep)
        if form != "fused":
            trainer.step_by_autograd(captured=form == "captured")
        yield trainer


@each_placement
@pytest.mark.parametrize("form", ["fused", "captured"])
def test_replayed_graphs_train_as_eager_steps_do(tmp_path, placement, form):
    with trainer_by("eager", tmp_path) as eager, trainer_by(form, tmp_path, placement) as captured:
        check_captured_equals_eager(eager, captured)


@each_placement
def test_a_capture_leaves_no_trace(tmp_path, placement):
    with trainer_by("captured", tmp_path, placement) as trainer:
        check_a_capture_leaves_no_trace(trainer)


@each_placement
def test_preparing_the_fused_step_leaves_no_trace(tmp_path, placement):
    with trainer_by("fused", tmp_path, placement) as trainer:
        check_preparing_leaves_no_trace(trainer)


@pytest.mark.parametrize("form", ["fused", "captured"])
def test_a_loss_that_is_not_finite_stops_replayed_graphs(tmp_path, form):
    with trainer_by(form, tmp_path) as trainer:
        check_a_loss_that_is_not_finite_stops_replayed_graphs(trainer)


@pytest.mark.parametrize("form", ["fused", "captured"])
def test_a_capture_bears_a_thread_that_pins_memory(tmp_path, form):
    """The loader's thread pins memory if the device does not hold the table."""
    stop = threading.Event()
    pinned = []

    def pin() -> None:
        while not stop.is_set() and len(pinned) < 4000:
            pinned.append(torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True))

    with trainer_by(form, tmp_path) as trainer:
        taken = list(trainer.batches(0))
        thread = threading.Thread(target=pin)
        thread.start()
        try:
            losses = [trainer.take(prepared).item() for prepared in taken]
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


@pytest.mark.parametrize("form", ["fused", "captured", "eager"])
@each_placement
def test_nothing_waits_for_the_device_within_an_epoch(tmp_path, placement, form):
    with trainer_by(form, tmp_path, placement) as trainer:
        train_epochs(trainer, 1)  # kernels are compiled, graphs captured
        trainer.step.read()
        with no_synchronisation():
            with pytest.raises(RuntimeError, match="synchroniz"):
                trainer.step.record.tolist()
            for prepared in trainer.batches(0):
                trainer.take(prepared)
        assert trainer.step.read().rows == sum(len(batch.targets) for batch in epoch_batches(make_data(), 64, 0, 0))


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
        first, *other_checkpoints = (load_checkpoint(run / name)[0] for run in runs)
        for checkpoint in other_checkpoints:
            assert_identical(checkpoint, first)


# Memory


def live_memory() -> list[int]:
    """Return the bytes that are allocated, and their maximum."""
    stats = torch.cuda.memory_stats()
    return [stats[name] for name in LIVE]


@each_placement
@pytest.mark.parametrize("form", ["fused", "captured"])
def test_memory_does_not_grow_over_epochs(tmp_path, placement, form):
    streams: list[set[int]] = []  # the streams with reserved memory, which they do not share

    def start() -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def read() -> list[int]:
        streams.append({segment["stream"] for segment in torch.cuda.memory_snapshot()})
        return live_memory()

    with trainer_by(form, tmp_path, placement) as trainer:
        check_memory_does_not_grow(trainer, start, read)
    assert len({len(epoch_streams) for epoch_streams in streams}) == 1, streams
