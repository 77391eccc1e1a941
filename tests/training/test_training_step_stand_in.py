"""The GPU's tests of the captured step on a CPU, with a stand-in for the graph: they run, and their checks hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.captured_steps import (
    check_a_capture_leaves_no_trace,
    check_a_loss_that_is_not_finite_stops_replayed_graphs,
    check_captured_equals_eager,
    new_trainer,
)
from iisan_fast.training.trainer import Trainer, deterministic
from iisan_fast.training.training_step import CapturedStep

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with deterministic():
        yield


@contextmanager
def stand_in(folder: Path, placement: str = "device") -> Iterator[Trainer]:
    """A trainer whose steps are "captured": warmed up once without a trace, then called again and again."""
    with new_trainer(folder, CPU, placement) as trainer:

        def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            record = trainer.step.record.clone()
            trainer.step.record[2] = 1  # as before a graph's capture
            run()
            trainer.step.record.copy_(record)
            return run

        trainer.captured = CapturedStep(trainer.step, capture)
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
