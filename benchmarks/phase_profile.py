"""Profile a training step: the time of its phases, and its memory by purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from statistics import median
from typing import Any

from torch import nn

from ..evaluation import memory_split, parameter_counts
from ..models import activation_bytes
from ..states import FeatureTable, PreparedBatch
from ..training import Trainer, deterministic
from .stopwatch import Stopwatch

WARM_UP_STEPS = 2
PHASES = ("encoding", "forward", "backward", "update")


def profile(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Return median milliseconds of a step's phases, bytes of its memory by purpose, and counts of parameters.

    `encoding` is the wait for a batch and, in an uncached run, for its frozen encoders. Trained encoders compute in
    `forward` and `backward`. Each phase waits for the device, and none is captured in a graph: their sum is longer than
    an ordinary step. A fused step on a GPU has no such phases, so autograd takes its place. The steps train the
    trainer's model.
    """
    if trainer.plan is not None:
        trainer.step_by_autograd(captured=False)
    trainer.model.train()
    laps = []
    activation_bytes = 0
    with deterministic():
        for prepared, watch in _watched(trainer, WARM_UP_STEPS + steps):
            if len(laps) < WARM_UP_STEPS:
                activation_bytes = max(activation_bytes, _activations(trainer, prepared))
            trainer.step(prepared.batch, prepared.item_inputs, watch.lap)
            laps.append(watch.seconds)
    modules = [trainer.model, *_frozen_encoders(trainer)]
    measured = laps[WARM_UP_STEPS:] or laps
    return {
        "phases_ms": {phase: 1000 * median(lap[phase] for lap in measured) for phase in PHASES},
        "memory_bytes": memory_split(modules, trainer.step.optimizer, activation_bytes),
        "parameters": parameter_counts(nn.ModuleList(modules)),
    }


def _watched(trainer: Trainer, steps: int) -> Iterator[tuple[PreparedBatch, Stopwatch]]:
    """Yield batches and the watches that timed the wait for them: as many as asked for, or an epoch's."""
    with closing(trainer.batches(epoch=0)) as batches:
        for _ in range(steps):
            watch = Stopwatch(trainer.device)
            prepared = next(batches, None)
            if prepared is None:
                return
            watch.lap("encoding")
            yield prepared, watch


def _activations(trainer: Trainer, prepared: PreparedBatch) -> int:
    """Return the bytes that a batch's loss keeps for its backward pass, beside weights and tables.

    If parts of it are computed again in the backward pass, the estimate that decided so is returned.
    """
    if trainer.memory.encoding is not None and trainer.memory.encoding.recompute:
        return trainer.memory.encoding.estimate
    model = trainer.model
    source = trainer.source
    held = [*model.parameters(), *model.buffers(), *(source.views if isinstance(source, FeatureTable) else ())]
    return activation_bytes(lambda: model.loss(prepared.batch, prepared.item_inputs), held)


def _frozen_encoders(trainer: Trainer) -> list[nn.Module]:
    """Return the encoders, each once, that run but are no part of the model."""
    inputs = getattr(trainer.source, "inputs", None)
    return [] if inputs is None else list(dict.fromkeys(backbone.model for backbone in inputs.backbones))
