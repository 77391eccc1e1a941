"""Compute the learning rates of a run's steps: a factor of the groups' rates, by the number of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import TrainConfig


@dataclass(frozen=True)
class RateSchedule:
    """The factor of all learning rates in each step of a run of `steps` steps.

    It rises in equal parts to 1, which it reaches in the last of `warmup` steps. From there it stays at 1 ("constant"),
    or falls to 0, which it would reach in the step after the last: on a line ("linear") or on half a cosine wave
    ("cosine"; Loshchilov and Hutter 2017, equation 5).
    """

    kind: str  # one of config.SCHEDULES
    warmup: float  # in steps; need not be a whole number
    steps: int

    @classmethod
    def of(cls, train: TrainConfig, steps_per_epoch: int) -> RateSchedule:
        """Return the schedule of a run's settings."""
        return cls(train.schedule, train.warmup_epochs * steps_per_epoch, train.max_epochs * steps_per_epoch)

    def factor(self, step: int) -> float:
        """Return the factor, from 0 to 1, in a step; the run's first step is number 0."""
        if step + 1 <= self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = min(max(step - self.warmup, 0) / (self.steps - self.warmup), 1)
        return 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
