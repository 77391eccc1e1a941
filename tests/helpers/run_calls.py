"""Train whole runs on the ranks of a job; the processes import the functions from here."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from iisan_fast.config import RunConfig
from iisan_fast.errors import InputError, Stopped
from iisan_fast.precision import Precision
from iisan_fast.ranks import Ranks, refuse_unshared
from iisan_fast.training import lost_best, resume_run, start_run, trainer, training_loop
from iisan_fast.training.checkpoints import ITEM_VECTORS
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")
PRECISION = Precision(table=torch.float64, products=torch.float32)  # the dtype of products is read on a GPU alone


@contextmanager
def in_float64() -> Iterator[None]:
    """Train in float64, in which sums in another order differ by 1e-16 of themselves."""
    build = trainer.build_recommender
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_recommender", lambda *arguments: build(*arguments).double())
        for module in (training_loop, lost_best):
            patch.setattr(module, "item_vectors", lambda tensors, *_: tensors[ITEM_VECTORS])
        for module in (start_run, resume_run):
            patch.setattr(module, "resolve_precision", lambda *_: PRECISION)
        yield


def trained(ranks: Ranks, config: RunConfig, out: Path, stop: tuple[int, int] | None = None, **options: Any) -> Any:
    """Return the figures of a new run, and the epochs that were reported, or the message that ended it.

    stop: a rank, and the step before which it gets SIGTERM.
    """
    return _ended(ranks, stop, lambda on_epoch: train(config, out, CPU, on_epoch, ranks=ranks, **options))


def resumed(ranks: Ranks, out: Path, stop: tuple[int, int] | None = None, **changes: Any) -> Any:
    """Return the figures of a run that goes on, and the epochs that were reported, or the message that ended it."""
    return _ended(ranks, stop, lambda on_epoch: resume(out, CPU, on_epoch, changes=RunChanges(**changes), ranks=ranks))


def unshared(ranks: Ranks, folders: list[Path]) -> list[str]:
    """Return the messages for the first folder, and for the folder of each rank, as if on a machine of its own."""
    messages = []
    for folder in (folders[0], folders[ranks.rank]):
        os.chdir(folder)
        try:
            refuse_unshared(dataclasses.replace(ranks, on_this_machine=1), Path("runs"))
            messages.append("")
        except InputError as error:
            messages.append(str(error))
    return messages


def trained_unlike(ranks: Ranks, configs: list[RunConfig], out: Path) -> str:
    """Return the message that ends a run for which each rank has its configuration."""
    return trained(ranks, configs[ranks.rank], out)[0]


def _ended(ranks: Ranks, stop: tuple[int, int] | None, run: Callable[[Callable], dict[str, Any]]) -> Any:
    epochs: list[int] = []
    with in_float64(), pytest.MonkeyPatch.context() as patch:
        if stop is not None and stop[0] == ranks.rank:
            _signal_before(patch, stop[1])
        try:
            return run(lambda line: epochs.append(line["epoch"])), epochs
        except (InputError, Stopped) as error:
            return str(error), epochs


def _signal_before(patch: pytest.MonkeyPatch, step: int) -> None:
    """Raise SIGTERM in this process before a step, counted from 1."""
    take = Trainer.take
    steps = itertools.count(1)

    def signalled(self: Trainer, prepared: Any) -> Any:
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return take(self, prepared)

    patch.setattr(Trainer, "take", signalled)
