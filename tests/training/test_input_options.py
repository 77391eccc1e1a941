"""Check runs with standardised states, added item vectors and reversed histories: resume, folders, captured steps."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import captured_steps
from helpers.captured_steps import check_a_capture_leaves_no_trace, check_captured_equals_eager, new_trainer
from helpers.run_folders import assert_same_run
from iisan_fast.benchmarks.captures import call_again_for_graphs
from iisan_fast.config import EvaluationConfig, ModelConfig, RunConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import Stopped
from iisan_fast.precision import resolve_precision
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.checkpoints import load_checkpoint, save_checkpoint
from iisan_fast.training.determinism import deterministic
from iisan_fast.training.dry_run import describe_new_run
from iisan_fast.training.fused_step import CpuFusedStep
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")
OPTIONS = {"standardise": True, "item_ids": True}


def with_options(config: RunConfig, epochs: int, **model) -> RunConfig:
    """Return a configuration with all options on."""
    changed = replace(config.model, **OPTIONS, **model)
    optimisation = replace(config.train, max_epochs=epochs, reverse=True)
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


def test_a_run_stopped_within_an_epoch_resumes_exactly_with_all_options_on(tmp_path, toy_config, monkeypatch):
    train(with_options(toy_config, 1), tmp_path / "whole", CPU)
    take = Trainer.take

    def stopping(self, prepared):
        if prepared.batch.step == 5:
            signal.raise_signal(signal.SIGINT)
        return take(self, prepared)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "take", stopping)
        train(with_options(toy_config, 1), tmp_path / "stopped", CPU)
    resume(tmp_path / "stopped", CPU)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_reversed_histories_double_the_epoch_and_leave_the_rest(tmp_path, toy_config):
    config = replace(toy_config, train=replace(toy_config.train, max_epochs=1))
    dataset = load_dataset(Path(config.dataset))
    reverse = replace(config, train=replace(config.train, reverse=True))
    precision = resolve_precision(config, CPU)
    trainers = []
    for settings in (config, reverse):
        with open_source(settings, dataset, CPU, "auto", precision) as (source, _):
            trainers.append(Trainer(settings, dataset.sequences, source, CPU, precision))
    plain, doubled = trainers
    users = len(dataset.sequences.user_ids)
    batch_users = config.train.batch_users
    assert [plain.steps_per_epoch, doubled.steps_per_epoch] == [-(-users // batch_users), -(-2 * users // batch_users)]
    assert doubled.sequences is plain.sequences and doubled.memory.estimate == plain.memory.estimate
    assert torch.equal(doubled.model.log_popularity, plain.model.log_popularity)
    seen = [user for batch in doubled.batches(0) for user in batch.batch.users.tolist()]
    assert sorted(seen) == list(range(2 * users))
    planned = [describe_new_run(settings, tmp_path / "run", CPU) for settings in (config, reverse)]
    assert [plan["steps_per_epoch"] for plan in planned] == [plain.steps_per_epoch, doubled.steps_per_epoch]
    assert planned[0]["users"] == planned[1]["users"] == users
    results = [train(settings, tmp_path / f"{number}", CPU) for number, settings in enumerate((config, reverse))]
    assert results[0]["popularity"] == results[1]["popularity"]


def test_fused_steps_with_standardised_states_and_reversed_histories_equal_autograd(toy_config):
    changed = replace(toy_config, model=replace(toy_config.model, standardise=True))
    config = replace(changed, train=replace(changed.train, reverse=True))
    dataset = load_dataset(Path(config.dataset))
    precision = resolve_precision(config, CPU)
    losses = []
    weights = []
    for fused in (True, False):
        with open_source(config, dataset, CPU, "auto", precision) as (source, _):
            trainer = Trainer(config, dataset.sequences, source, CPU, precision)
            assert isinstance(trainer.step, CpuFusedStep)
            if not fused:
                trainer.step_by_autograd(captured=False)
            trainer.model.train()
            losses.append([float(trainer.take(prepared)) for prepared in trainer.batches(0)])
            weights.append(dict(trainer.model.named_parameters()))
    assert len(losses[0]) == trainer.steps_per_epoch
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5, msg=name)


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
