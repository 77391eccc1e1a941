"""Copy and compare the tensors that a training step changes."""

from __future__ import annotations

import torch
from torch import Tensor

from iisan_fast.training.training_step import TrainingStep


def everything(step: TrainingStep) -> dict[str, Tensor]:
    """Return copies of the weights and of Adam's state, by name."""
    tensors = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    for name, parameter in step.model.named_parameters():
        for kind, value in step.optimizer.state[parameter].items():
            tensors[f"{kind} of {name}"] = value.clone()
    return tensors


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
