"""Describe the update of a step: the groups of parameters with their rates, and what is added to plain Adam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..config import TrainConfig
from ..models import Recommender


@dataclass(frozen=True)
class UpdateOptions:
    """The settings of an update beside its learning rates. By default it is plain Adam."""

    weight_decay: float = 0.0  # decoupled: a weight loses rate * weight_decay of itself in a step
    clip_norm: float | None = None  # largest L2 norm of all gradients together; None for any
    ema_decay: float = 0.0  # of the averaged weights; 0 for none
    scheduled: bool = False  # True: learning rates change from step to step

    @classmethod
    def of(cls, train: TrainConfig) -> UpdateOptions:
        """Return the options of a run's settings."""
        return cls(train.weight_decay, train.clip_norm, train.ema_decay, train.scheduled)


PLAIN_ADAM = UpdateOptions()


class UpdateGroup(NamedTuple):
    """Parameters with one learning rate and one weight decay."""

    parameters: list[nn.Parameter]
    rate: float
    decay: float


def update_groups(model: Recommender, rates: Mapping[str, float], options: UpdateOptions) -> list[UpdateGroup]:
    """Return the trained parameters in groups of one learning rate and one weight decay, each parameter once.

    rates: learning rates by the names of `model.parameter_groups()`. With weight decay, a named group is divided into
    the parameters that decay (`model.decayed_parameters`) and the others.
    """
    named = model.parameter_groups()
    if not options.weight_decay:
        return [UpdateGroup(parameters, rates[name], 0.0) for name, parameters in named.items()]
    decayed = {id(parameter) for parameter in model.decayed_parameters()}
    groups = []
    for name, parameters in named.items():
        for decay in (options.weight_decay, 0.0):
            chosen = [parameter for parameter in parameters if (id(parameter) in decayed) == (decay > 0)]
            groups.append(UpdateGroup(chosen, rates[name], decay))
    return groups
