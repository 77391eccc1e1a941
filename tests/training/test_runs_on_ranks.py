"""Whole runs on several ranks: those of one rank, stopped and resumed, also on other numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.rank_processes import run_on_ranks
from helpers.run_calls import resumed, trained
from helpers.run_folders import untimed
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.ranks import ALONE
from iisan_fast.training.checkpoints import load_checkpoint

FAST = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}
EPOCHS = 2
STEPS = 5  # of an epoch: 60 users, 13 a batch, 8 in the last


@pytest.fixture(scope="module")
def config(toy_run) -> RunConfig:
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    train = TrainConfig(batch_users=13, max_epochs=EPOCHS, learning_rates=FAST)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=train)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """Train the run on one rank, and return its folder."""
    run = tmp_path_factory.mktemp("alone") / "run"
    trained(ALONE, config, run)
    return run


def assert_near(run: Path, other: Path) -> None:
    """Assert that two finished runs are the same to 1e-9: losses and figures, weights, Adam's state, item vectors."""
    for line, expected in zip(untimed(run), untimed(other), strict=True):
        assert line.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-9)
        assert line == expected
    assert json.loads((run / "test.json").read_text()) == json.loads((other / "test.json").read_text())
    for name in ("best.safetensors", "last.safetensors"):
        (tensors, state), (expected, expected_state) = (load_checkpoint(folder / name) for folder in (run, other))
        assert tensors.keys() == expected.keys() and state.keys() == expected_state.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")


def test_a_run_on_ranks_is_that_of_one(tmp_path, config, alone):
    results = run_on_ranks(2, trained, config, tmp_path / "run")
    assert results[0][0] == results[1][0]
    assert [epochs for _, epochs in results] == [[1, 2], []]  # rank 0 alone reports
    assert_near(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2


def test_a_signal_on_one_rank_stops_all_after_the_same_step_and_one_goes_on(tmp_path, config, alone):
    run = tmp_path / "run"
    results = run_on_ranks(2, trained, config, run, (1, STEPS + 3))
    message = f"{run}: step 3 of epoch 2 is saved; go on with iisan-fast train --resume {run}"
    assert [text for text, _ in results] == [message] * 2
    state = load_checkpoint(run / "last.safetensors")[1]
    assert (state["epoch"], state["under_way"]["steps"]) == (1, 3)
    resumed(ALONE, run)
    assert_near(run, alone)
