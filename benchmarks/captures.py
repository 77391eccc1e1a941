"""Capture a training step in a CUDA graph, timed apart from the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice

from torch import Tensor

from ..training import CapturedStep, Trainer
from .machine import synchronise
from .tables import NOT_MEASURED


def capture_step(trainer: Trainer) -> float | str:
    """Capture the step on the first batch, in the one shape of the run, and return the seconds.

    Nothing is trained. Where the trainer captures nothing, NOT_MEASURED is returned.
    """
    if trainer.plan is None and trainer.captured is None:
        return NOT_MEASURED
    with closing(trainer.batches(0)) as batches:
        (first,) = islice(batches, 1)
        synchronise(trainer.device)
        started = time.perf_counter()
        if trainer.captured is None:
            trainer.step.prepare()
        else:
            trainer.captured.prepare(first.batch, first.item_inputs)
        synchronise(trainer.device)
    return time.perf_counter() - started


def call_again_for_graphs(trainer: Trainer) -> None:
    """Give a trainer on a CPU a stand-in for CUDA graphs: a step is "replayed" by calling it again.

    It is the step by autograd, which graphs capture. As before a capture, one call warms the step up with the failure
    flag set, so that it updates nothing.
    """
    trainer.step_by_autograd(captured=False)

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        record = trainer.step.record.clone()
        trainer.step.record[2] = 1
        run()
        trainer.step.record.copy_(record)
        return run

    trainer.captured = CapturedStep(trainer.step, capture)
