"""Time the stages of a computation, one after the other."""

from __future__ import annotations

import time

import torch

from .machine import synchronise


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
        synchronise(self.device)
        return time.perf_counter()
