"""Time the stages of a computation, one after the other, and sum up repeated times."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from .machine import synchronise
from .tables import QUANTILES, quantile_keys


class Stopwatch:
    """The seconds of stages that follow one another; each stage ends when the device has finished its work."""

    def __init__(self, device: torch.device) -> None:
        """Start the first stage."""
        self.device = device
        self.seconds: dict[str, float] = {}
        self.started = self._now()

    def lap(self, stage: str) -> None:
        """End a stage and start the next."""
        ended = self._now()
        self.seconds[stage], self.started = ended - self.started, ended

    def _now(self) -> float:
        """Return the time in seconds once the device has finished its work."""
        synchronise(self.device)
        return time.perf_counter()


def quantiles(times: Sequence[float], unit: str) -> dict[str, float]:
    """Return p20, p50 and p80 of times in a unit: {"p20_s": …, "p50_s": …, "p80_s": …} for "s"."""
    return dict(zip(quantile_keys(unit), np.quantile(times, QUANTILES).tolist()))
