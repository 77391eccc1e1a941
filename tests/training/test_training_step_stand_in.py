"""Run the GPU's checks of the captured step on a CPU, with a stand-in for the graph, and check that they can fail."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers.captured_steps import (
    check_a_capture_leaves_no_trace,
    check_a_loss_that_is_not_finite_stops_replayed_graphs,
    check_captured_equals_eager,
    check_memory_does_not_grow,
    new_trainer,
)
from iisan_fast.benchmarks.captures import call_again_for_graphs
from iisan_fast.training.determinism import deterministic
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with deterministic():
        yield


@contextmanager
def stand_in(folder: Path, placement: str = "device") -> Iterator[Trainer]:
    """Yield a trainer whose "captured" step is warmed up once without a trace, and then called again for each batch."""
    with new_trainer(folder, CPU, placement) as trainer:
        call_again_for_graphs(trainer)
        yield trainer


@pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])
def test_captured_equals_eager(tmp_path, placement):
    with new_trainer(tmp_path, CPU) as eager, stand_in(tmp_path, placement) as captured:
        check_captured_equals_eager(eager, captured)


def test_a_capture_leaves_no_trace(tmp_path):
    with stand_in(tmp_path) as trainer:
        check_a_capture_leaves_no_trace(trainer)


def test_a_loss_that_is_not_finite_stops_replayed_graphs(tmp_path):
    with stand_in(tmp_path) as trainer:
        check_a_loss_that_is_not_finite_stops_replayed_graphs(trainer)


def live_tensors() -> list[torch.Tensor]:
    """Return the tensors in a CPU's memory, without the fake ones that torch.compile leaves behind."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in tensors if tensor.device.type == "cpu"]


def live_bytes() -> list[int]:
    """Return the bytes of these tensors, in a list of one."""
    storages = [tensor.untyped_storage() for tensor in live_tensors()]
    return [sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())]


@pytest.fixture
def tensors_of_other_tests() -> list[torch.Tensor]:
    """Keep the tensors of earlier tests, so that none of them is freed while memory is compared."""
    return live_tensors()


def test_memory_does_not_grow_over_epochs(tmp_path, tensors_of_other_tests):
    with stand_in(tmp_path, "pinned") as trainer:
        check_memory_does_not_grow(trainer, lambda: None, live_bytes)


@pytest.mark.slow
def test_memory_that_grows_is_seen(tmp_path, monkeypatch):
    losses = []
    with stand_in(tmp_path) as trainer:
        take = trainer.take
        monkeypatch.setattr(trainer, "take", lambda prepared: losses.append(take(prepared).clone()) or losses[-1])
        with pytest.raises(AssertionError):
            check_memory_does_not_grow(trainer, lambda: None, live_bytes)
