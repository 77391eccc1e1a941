"""How the fused step puts its ops together: their order, the places for collectives, and one capture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from helpers.recommenders import side_recommender
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.training.fused_step import CapturedFusedStep, step_stages


class Logged:
    """An op whose methods write their names down."""

    def __init__(self, name: str, calls: list[str]) -> None:
        for method in ("forward", "backward", "update"):
            setattr(self, method, lambda method=method: calls.append(f"{name}.{method}"))


ORDER = (
    "batch.forward fold.forward | towers.forward | sequence.forward loss.forward record.forward | loss.backward "
    "sequence.backward collect.backward towers.backward fold.backward | adam.update"
)


def test_a_captured_step_runs_all_ops_in_order_and_is_captured_once():
    calls, captured = [], []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        return run

    model = side_recommender([(2, 8), (2, 8)], ModelConfig(embedding_dim=8, bottleneck=4), 5, np.full(4, 0.3), 1)
    rates, made_from = dict.fromkeys(model.parameter_groups(), 1e-3), []

    def make_ops(tensors: kernels.StepTensors) -> kernels.StepOps:
        made_from.append(tensors)
        return kernels.StepOps(*(Logged(name, calls) for name in kernels.StepOps._fields))

    step = CapturedFusedStep(model, rates, torch.device("cpu"), torch.bfloat16, make_ops, capture)
    assert len(captured) == 1 and not calls
    for _ in range(2):
        assert step() is step.loss
    assert calls == 2 * ORDER.replace("| ", "").split()
    (tensors,) = made_from
    assert tensors.operands.fusion.dtype == torch.bfloat16 and tensors.operand_buffer is step.storage.operand
    assert tensors.record is step.record and tensors.loss is step.loss and tensors.adam.steps is step.storage.steps
    assert step.optimizer.state.keys() == set(model.parameters())


def test_stages_end_where_collectives_go():
    """After the item vectors, and after the gradients."""
    calls: list[str] = []
    ops = kernels.StepOps(*(Logged(name, calls) for name in kernels.StepOps._fields))
    for stage in step_stages(ops):
        for method in stage.methods:
            method()
        calls.append("|")
    assert " ".join(calls[:-1]) == ORDER
