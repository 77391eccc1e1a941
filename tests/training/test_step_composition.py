"""Check how the fused step puts its ops together: their order, the places for collectives, and one capture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.states.loader import PlannedBatch
from iisan_fast.training.fused_step import GpuFusedStep, fused_step_refusal, run_stages, step_stages


class Logged:
    """An op whose methods log their names."""

    def __init__(self, name: str, calls: list[str]) -> None:
        for method in ("forward", "backward", "update"):
            setattr(self, method, lambda method=method: calls.append(f"{name}.{method}"))


ORDER = (
    "batch.forward fold.forward | towers.forward | sequence.forward loss.forward record.forward | loss.backward "
    "sequence.backward collect.backward towers.backward fold.backward | adam.update"
)


def test_a_gpu_step_runs_all_ops_in_order_and_is_captured_once(monkeypatch):
    calls, captured, made_from = [], [], []

    class LoggedStep:
        def __init__(self, tensors: kernels.StepTensors, *arguments: object, reads_by_number: bool) -> None:
            made_from.append(tensors)
            self.ops = kernels.StepOps(*(Logged(name, calls) for name in kernels.StepOps._fields))

        def set_window(self, window: Tensor) -> None:
            calls.append(f"window of {len(window)}")

        def set_items(self, states: list[kernels.States]) -> None:
            calls.append("items")

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        return run

    monkeypatch.setattr(kernels, "gpu_step", LoggedStep)
    shapes = [(2, 8), (2, 8)]
    sequences = make_sequences([[1, 2, 3, 4, 5]] * 4)
    model = side_recommender(shapes, ModelConfig(embedding_dim=8, bottleneck=4), 5, np.full(6, 0.3), 1)
    rates = dict.fromkeys(model.parameter_groups(), 1e-3)
    plan = RunPlan.of(sequences, 2, seed=0)
    step = GpuFusedStep(model, rates, random_table(shapes, 5), plan, torch.bfloat16, capture)
    assert not captured
    for window in (torch.zeros(2, 4), None):
        assert step(PlannedBatch(window, None, rows=1, slots=2)) is step.loss
    order = ORDER.replace("| ", "").split()
    assert len(captured) == 1 and calls == ["window of 2", *order, *order]
    (tensors,) = made_from
    assert tensors.operands.fusion.dtype == torch.bfloat16 and tensors.operand_buffer is step.storage.operand
    assert tensors.record is step.record and tensors.loss is step.loss and tensors.adam.steps is step.storage.steps
    assert step.optimizer.state.keys() == set(model.parameters())


def test_stages_end_where_collectives_go():
    """Collectives go after the item vectors, and after the gradients."""
    calls: list[str] = []
    ops = kernels.StepOps(*(Logged(name, calls) for name in kernels.StepOps._fields))
    for stage in step_stages(ops):
        for method in stage.methods:
            method()
        calls.append("|")
    assert " ".join(calls[:-1]) == ORDER


def test_stages_of_several_ranks_have_all_ops_in_order_with_an_exchange_at_each_seam():
    calls: list[str] = []
    ops = kernels.StepOps(*(Logged(name, calls) for name in kernels.StepOps._fields))

    class Exchanges:
        def __getattr__(self, name: str) -> Callable[[], None]:
            return lambda: calls.append(f"[{name}]")

    run_stages(step_stages(ops, Exchanges()))
    expected = ORDER.replace("towers.forward |", "towers.forward [gather_vectors]")
    expected = expected.replace("collect.backward", "collect.backward [add_vector_gradients]")
    expected = expected.replace("fold.backward |", "fold.backward [add_gradients]")
    assert calls == expected.replace("| ", "").split()


@pytest.mark.parametrize(
    ("config", "max_inputs", "products", "reason"),
    [
        (dict(embedding_dim=48), 10, torch.bfloat16, "it needs item vectors of 16, 32, 64, 128 dimensions, found 48"),
        (dict(attention_heads=8), 10, torch.bfloat16, "it needs 1 to 8 heads of at least 8, found 8 over 32"),
        (dict(sanb="phm"), 10, torch.bfloat16, "its towers' weights are products of others"),
        ({}, 65, torch.bfloat16, "it needs at most 64 positions, found 65"),
        ({}, 10, torch.float16, "it needs products in float32 or bfloat16, found float16"),
        ({}, 64, torch.bfloat16, ""),
        (dict(embedding_dim=64, attention_heads=8), 10, torch.float32, ""),
        (dict(embedding_dim=128, attention_heads=1), 10, torch.bfloat16, ""),
        (dict(inter=False), 10, torch.bfloat16, ""),
    ],
)
def test_models_that_no_step_on_a_gpu_takes_say_why(config, max_inputs, products, reason):
    config = ModelConfig(**{"embedding_dim": 32, "bottleneck": 16} | config)
    model = side_recommender([(2, 32), (2, 32)], config, max_inputs, np.full(6, 0.3), 1)
    assert fused_step_refusal(model, torch.device("cuda"), products) == reason
