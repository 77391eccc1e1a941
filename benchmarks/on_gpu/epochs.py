"""Whole epochs of captured steps: captures apart, time, peak memory, and which kernels the time goes to."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from ...data import Sequences, steps_per_epoch
from ...training import Trainer, deterministic
from ..captures import capture_step
from ..machine import synchronise
from ..tables import NOT_MEASURED
from ..train import FORMS, TrainingForm
from .common import captured_forms, device_of, histories, random_states, trainer_of
from .profiles import Profile, profile_of
from .settings import Save, Settings

TABLE_FILE = "profile.txt"
EAGER_STEPS = 5  # profiled


def measure(settings: Settings, save: Save) -> None:
    """Save each form's captures, epochs and memory, then the profiles, the most telling figures first."""
    sequences = histories(settings)
    result: dict[str, Any] = {"steps_an_epoch": steps_per_epoch(sequences, settings.users), "forms": {}, "profiles": {}}
    tables = random_states(sequences, settings)
    with deterministic():
        for name, form in captured_forms(settings).items():
            row = result["forms"][name] = {}
            for figures in epoch_figures(form, sequences, tables, settings):
                row |= figures
                result["headline"] = headline(result)
                save(result)
            if not result["profiles"]:  # of the first form, before the others are timed
                result["profiles"] = profiles(form, sequences, tables, settings)
                save(result)


def epoch_figures(
    form: TrainingForm, sequences: Sequences, tables: list[torch.Tensor], settings: Settings
) -> Iterator[dict[str, Any]]:
    """Yield a form's figures as they come: captures, epochs, memory, and parts of the time.

    Raises SystemExit if a loss is not finite.
    """
    device = device_of(settings)
    if device.type == "cuda":
        gc.collect()  # what the form before captured is free
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = trainer_of(form, sequences, tables, settings)
    trainer.model.train()
    yield {"capture_s": capture_step(trainer)}
    epoch(trainer, 0)  # warms up what is left: the allocator, the host's threads
    yield {"epoch_s": [epoch(trainer, number) for number in range(settings.epochs)]}
    reading = trainer.step.read()
    if reading.failed_step is not None:
        raise SystemExit(f"epochs: expected finite losses, found {reading.failed_loss} in step {reading.failed_step}")
    yield {"mean_loss": reading.loss / reading.rows, **memory(device)}
    yield {"batches_alone_s": batches_alone(trainer), "step_on_device_ms": step_on_device(trainer)}


def epoch(trainer: Trainer, number: int) -> float:
    """Return the seconds of an epoch's steps, its batches prepared meanwhile."""
    synchronise(trainer.device)
    started = time.perf_counter()
    for batch in trainer.batches(number):
        trainer.take(batch)
    synchronise(trainer.device)
    return time.perf_counter() - started


def batches_alone(trainer: Trainer) -> float:
    """Return the seconds in which an epoch's batches are prepared and copied, no step taken."""
    synchronise(trainer.device)
    started = time.perf_counter()
    for _ in trainer.batches(0):
        pass
    synchronise(trainer.device)
    return time.perf_counter() - started


def step_on_device(trainer: Trainer) -> float | str:
    """Return the milliseconds of a captured step by events, over an epoch of batches that are prepared before."""
    if trainer.device.type != "cuda":
        return NOT_MEASURED
    batches = list(trainer.batches(0))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for batch in batches:
        trainer.take(batch)
    end.record()
    synchronise(trainer.device)
    return start.elapsed_time(end) / len(batches)


def memory(device: torch.device) -> dict[str, int | str]:
    """Return the GPU memory at its peak, the tables included."""
    if device.type != "cuda":
        return {"peak_cuda_bytes": NOT_MEASURED, "peak_reserved_bytes": NOT_MEASURED}
    peak = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return {"peak_cuda_bytes": peak, "peak_reserved_bytes": reserved}


def profiles(
    form: TrainingForm, sequences: Sequences, tables: list[torch.Tensor], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Profile captured steps and eager ones; write a table of all kernels and a trace of each."""
    eager = FORMS["eager"] if FORMS["eager"].runs_on(device_of(settings)) else replace(form, captured=False)
    taken = {
        "captured": profile_steps(form, settings.steps, sequences, tables, settings),
        "eager": profile_steps(eager, EAGER_STEPS, sequences, tables, settings),
    }
    texts = [f"{name}, {one.steps} steps\n{one.text()}" for name, one in taken.items()]
    (settings.out / TABLE_FILE).write_text("\n\n".join(texts) + "\n")
    for name, one in taken.items():
        one.write_trace(settings.out / f"trace-{name}.json.gz")
    return {name: one.as_json() for name, one in taken.items()}


def profile_steps(
    form: TrainingForm, count: int, sequences: Sequences, tables: list[torch.Tensor], settings: Settings
) -> Profile:
    """Profile steps of a form on batches that it has taken once before, so that nothing is compiled or captured."""
    trainer = trainer_of(form, sequences, tables, settings)
    trainer.model.train()
    with closing(trainer.batches(0)) as batches:
        taken = list(islice(batches, count))

    def take_all() -> None:
        for batch in taken:
            trainer.take(batch)

    take_all()
    return profile_of(take_all, len(taken), trainer.device)


def headline(result: dict[str, Any]) -> str:
    """Return a line on the epochs' times."""
    parts = []
    for name, row in result["forms"].items():
        epochs = ", ".join(f"{seconds:.3f}" for seconds in row.get("epoch_s", []))
        parts.append(f"{name}: epochs of {epochs or NOT_MEASURED} s, captures {row['capture_s']:.1f} s")
    return "; ".join(parts)
