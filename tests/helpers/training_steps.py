"""What a training step changes."""

from __future__ import annotations

import torch
from torch import Tensor

from iisan_fast.training.training_step import TrainingStep


def everything(step: TrainingStep) -> dict[str, Tensor]:
    """Copies of the weights and of all that Adam keeps."""
    found = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    for name, parameter in step.model.named_parameters():
        for kind, value in step.optimizer.state[parameter].items():
            found[f"{kind} of {name}"] = value.clone()
    return found


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
