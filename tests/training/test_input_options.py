"""Check runs with standardised states and added item vectors: exact resume, folders, captured steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import captured_steps
from helpers.captured_steps import check_a_capture_leaves_no_trace, check_captured_equals_eager, new_trainer
from helpers.run_folders import assert_same_run
from iisan_fast.benchmarks.captures import call_again_for_graphs
from iisan_fast.config import EvaluationConfig, ModelConfig, RunConfig
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.checkpoints import load_checkpoint, save_checkpoint
from iisan_fast.training.determinism import deterministic
from iisan_fast.training.resume_run import RunChanges, resume
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
OPTIONS = {"standardise": True, "item_ids": True}


def with_options(config: RunConfig, epochs: int, **model) -> RunConfig:
    """Return a configuration with all options on."""
    changed = replace(config.model, **OPTIONS, **model)
    optimisation = replace(config.train, max_epochs=epochs, checkpoint_every=3)
    return replace(config, model=changed, train=optimisation)


@pytest.mark.parametrize("method", ["iisan", "frozen"])
def test_runs_resume_exactly_with_all_options_on(tmp_path, toy_config, method):
    config = toy_config
    if method == "frozen":
        optimisation = replace(config.train, learning_rates={})
        config = replace(config, model=ModelConfig("frozen", embedding_dim=16), train=optimisation)
    train(with_options(config, 2), tmp_path / "whole", CPU)
    train(with_options(config, 1), tmp_path / "stopped", CPU)
    resume(tmp_path / "stopped", CPU, changes=RunChanges(max_epochs=2))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    tensors, _ = load_checkpoint(tmp_path / "whole" / "last.safetensors")
    assert tensors["model.item_ids.weight"][1:].any() and not tensors["model.item_ids.weight"][0].any()


def test_a_finished_run_is_loaded_and_evaluated_without_the_added_vectors(tmp_path, toy_config):
    result = train(with_options(toy_config, 1), tmp_path / "run", CPU)
    path = tmp_path / "run" / "best.safetensors"
    tensors, state = load_checkpoint(path)
    del tensors["model.item_ids.weight"]
    save_checkpoint(path, tensors, state)
    best = load(tmp_path / "run", CPU)
    assert torch.equal(best.item_vectors, tensors["item_vectors"])
    assert evaluate_run(tmp_path / "run", "test", EvaluationConfig(), CPU)["test"] == result["test"]


def test_captured_steps_equal_eager_ones(tmp_path, monkeypatch):
    model = replace(captured_steps.CONFIG.model, item_ids=True)
    monkeypatch.setattr(captured_steps, "CONFIG", replace(captured_steps.CONFIG, model=model))
    with deterministic(), new_trainer(tmp_path, CPU) as eager, new_trainer(tmp_path, CPU) as captured:
        call_again_for_graphs(captured)
        check_captured_equals_eager(eager, captured)
    with deterministic(), new_trainer(tmp_path, CPU) as captured:
        call_again_for_graphs(captured)
        check_a_capture_leaves_no_trace(captured)
