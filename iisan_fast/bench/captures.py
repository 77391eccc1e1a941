"""CUDA graphs before an epoch is timed: capture every shape that its batches have, and time the captures apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from ..data import Batch, Shape, epoch_batches
from ..training import CapturedStep, Trainer
from .machine import NOT_MEASURED, synchronise


class Captures(NamedTuple):
    """The graphs captured before timing began."""

    shapes: int
    seconds: float

    def figures(self) -> dict[str, int | float]:
        """Return the columns of a result's row."""
        return {"captured_shapes": self.shapes, "capture_s": self.seconds}


NO_CAPTURES = {"captured_shapes": 0, "capture_s": NOT_MEASURED}  # the columns of a row without graphs


def capture_shapes(trainer: Trainer, epochs: Iterable[int]) -> Captures | None:
    """Capture every padded shape of these epochs, from one batch of each; None where the trainer captures nothing.

    An epoch's batches depend on its number and the seed alone, so they are known beforehand. Nothing is trained.
    """
    if trainer.captured is None:
        return None
    batches = one_batch_of_each_shape(trainer, epochs)
    synchronise(trainer.device)
    started = time.perf_counter()
    with closing(trainer.prepared(iter(batches.values()))) as prepared:
        for padded in prepared:
            trainer.captured.capture_shape(padded.batch, padded.item_inputs)
    synchronise(trainer.device)
    return Captures(len(batches), time.perf_counter() - started)


def one_batch_of_each_shape(trainer: Trainer, epochs: Iterable[int]) -> dict[Shape, Batch]:
    """Return the first batch, not padded yet, of each padded shape that these epochs have."""
    config = trainer.config.train
    batches: dict[Shape, Batch] = {}
    for epoch in epochs:
        for batch in epoch_batches(trainer.sequences, config.batch_users, config.seed, epoch):
            batches.setdefault(trainer.padded_shape(batch.shape), batch)
    return batches


def call_again_for_graphs(trainer: Trainer) -> None:
    """Give a trainer on a CPU a stand-in for CUDA graphs: a step is "replayed" by calling it again.

    As before a graph's capture, one call warms the step up with the failure flag set, so that it updates nothing.
    """

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        record = trainer.step.record.clone()
        trainer.step.record[2] = 1
        run()
        trainer.step.record.copy_(record)
        return run

    trainer.captured = CapturedStep(trainer.step, capture)
