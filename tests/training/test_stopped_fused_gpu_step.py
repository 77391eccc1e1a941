"""Check that a run by the GPU's fused step, in Triton's interpreter on a CPU, goes on exactly within an epoch."""

from __future__ import annotations

import signal

import pytest
import torch

from helpers.run_folders import assert_same_run
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.errors import Stopped
from iisan_fast.training.fused_step import GpuFusedStep
from iisan_fast.training.resume_run import resume
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer
from iisan_fast.training.update_options import UpdateOptions

CPU = torch.device("cpu")


@pytest.mark.long
@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_a_run_by_the_fused_gpu_step_goes_on_exactly(toy_run, tmp_path, monkeypatch, placement):
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=32, bottleneck=16)
    options = dict(weight_decay=1.0, schedule="linear", warmup_epochs=1.0, clip_norm=0.1, ema_decay=0.6)
    settings = TrainConfig(30, max_epochs=1, **(options if placement == "device" else {}))
    config = RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=settings)
    original = Trainer.__init__

    def fused(self, *arguments) -> None:
        original(self, *arguments)
        rates = self.config.train.learning_rates
        self.plan = RunPlan.of(self.sequences, 30, self.config.train.seed)
        options = UpdateOptions.of(self.config.train)
        arguments = self.model, rates, self.source, self.plan, torch.float32, lambda run: run, options
        self.step = GpuFusedStep(*arguments)

    monkeypatch.setattr(Trainer, "__init__", fused)
    figures = train(config, tmp_path / "whole", CPU, placement=placement)
    take = Trainer.take
    taken = []

    def signalled(self, planned):
        taken.append(planned)
        if len(taken) == 1:  # of two steps
            signal.raise_signal(signal.SIGTERM)
        return take(self, planned)

    monkeypatch.setattr(Trainer, "take", signalled)
    with pytest.raises(Stopped, match="step 1 of epoch 1 is saved"):
        train(config, tmp_path / "run", CPU, placement=placement)
    assert resume(tmp_path / "run", CPU, placement=placement) == figures
    assert_same_run(tmp_path / "run", tmp_path / "whole")
