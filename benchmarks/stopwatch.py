"""Where the time goes: the seconds of one stage after the other."""

from __future__ import annotations

import time

import torch

from .machine import synchronise


class Stopwatch:
    """The seconds of one stage after the other; each end waits for the device, so that a stage's work falls into it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.started = self._now()

    def lap(self, stage: str) -> None:
        """Ends a stage and starts the next."""
        ended = self._now()
        self.seconds[stage], self.started = ended - self.started, ended

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()
