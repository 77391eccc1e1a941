"""The GPU's tests of the captured step on a CPU, with a stand-in for the graph: they run, and their checks hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers.captured_steps import (
    check_a_capture_leaves_no_trace,
    check_a_loss_that_is_not_finite_stops_replayed_graphs,
    check_captured_equals_eager,
    new_trainer,
)
from iisan_fast.bench.captures import call_again_for_graphs
from iisan_fast.training.trainer import Trainer, deterministic

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with deterministic():
        yield


@contextmanager
def stand_in(folder: Path, placement: str = "device") -> Iterator[Trainer]:
    """A trainer whose steps are "captured": warmed up once without a trace, then called again and again."""
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
