"""An epoch in which the encoders run in every step, by each attention, beside an epoch on cached states.

Encoders have random weights and images are noise: neither changes the cost of a step. Every measurement is a new
process.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..config import RunConfig, TrainConfig, UncachedConfig
from ..data import Dataset, load_dataset, steps_per_epoch
from ..encoders import model_dtype, xformers_problem
from ..precision import resolve_precision
from ..progress import progress_bar
from ..training import Trainer, deterministic, open_source
from .cells import MEMORY_EVERY
from .harness import Setup
from .machine import on, peak_figures
from .peak_memory import PeakMemory
from .phase_profile import profile
from .processes import in_a_process
from .settings import TrainSettings, UncachedSettings, refuse_more
from .stand_ins import stand_ins, state_shape
from .stopwatch import Stopwatch
from .tables import NOT_MEASURED
from .train import VIEWS, WARM_UP_STEPS, fill_store

MEASURED_ATTENTIONS = ("xformers", "sdpa", "eager")
PROFILED = 10  # steps
NOTES = {
    "uncached": "iisan-fast train --uncached: IISAN over a ViT and a BERT of random weights, the vocabulary being the "
    "dataset's words, and images of noise; on CUDA encoders in bfloat16 and --table pinned, images in host memory",
    "cached": "iisan-fast train --cache, on random states of the same shape; on CUDA --table pinned",
    "opening": "encoders loaded, titles split into tokens, each image decoded once into the table; or states read",
    "epoch": "the steps of an epoch, batches made and copied included; the same steps warm up before (on CUDA all, so "
    "that the step is captured; else the first few)",
    "scaled": "steps_timed steps, multiplied by steps_an_epoch / steps_timed",
    "peak": "of opening and epoch: the largest sum of proportional set sizes, and of what torch holds on CUDA",
    "phases": "milliseconds of a step that waits after each of them, without a graph: longer than the epoch's",
    "paper": "an A6000, Scientific, 64 users a batch: uncached 179 s an epoch and 8.32 GB, cached 22 s and 3.11 GB",
    "aim": "an H200, Scientific, 64 users a batch: uncached within 8 s an epoch and under 3 GB of device memory",
}


def compare_uncached(setup: Setup, settings: UncachedSettings) -> dict[str, Any]:
    """Measure an uncached epoch by each attention, and a cached one. Raises InputError for too many users a batch."""
    sequences = setup.sequences
    device = setup.device
    refuse_more("--users", settings.users, len(sequences.user_ids), f"the users of {setup.name}")
    whole = steps_per_epoch(sequences, settings.users)
    count = min(settings.steps or whole, whole)
    with TemporaryDirectory(prefix="iisan-fast-") as scratch:
        stand_in_folder = setup.folder or Path(scratch) / "stand-ins"
        folder, views = stand_ins(setup.dataset, stand_in_folder, settings.encoder_size, settings.seed)
        train = TrainConfig(settings.users, seed=settings.seed)
        rows = []
        with progress_bar("uncached", len(MEASURED_ATTENTIONS) + 1, "epochs") as advance:
            for attention in MEASURED_ATTENTIONS:
                uncached = UncachedConfig(tuple(views), attention=attention)
                config = RunConfig(str(folder), uncached=uncached, train=train)
                row = unavailable(attention, device) or in_a_process(measure, config, count, device)
                rows.append({"form": f"uncached, {attention}", **row})
                advance(1, attention)
            cache = Path(scratch) / "states"
            in_a_process(fill_cache, load_dataset(folder), settings, cache)
            config = replace(config, uncached=None, cache=str(cache), views=VIEWS)
            rows.append({"form": "cached", **in_a_process(measure, config, count, device)})
            advance(1)
    return {
        "catalogue": len(sequences.item_ids),
        "steps_an_epoch": whole,
        "steps_timed": count,
        "scaled": count < whole,
        "notes": NOTES,
        "forms": rows,
    }


def unavailable(attention: str, device: torch.device) -> dict[str, Any] | None:
    """Return the row of an attention that the device does not have; None for one that it has."""
    problem = xformers_problem(device, model_dtype("auto", device)) if attention == "xformers" else None
    return problem and {"epoch_s": NOT_MEASURED, "why": problem}


def fill_cache(dataset: Dataset, settings: UncachedSettings, cache: Path) -> None:
    """Write random states of the encoders' shape into a cache."""
    layers, width = state_shape(settings.encoder_size)
    fill_store(dataset, TrainSettings(layers=layers, width=width, seed=settings.seed), cache)


def measure(config: RunConfig, steps: int, device: torch.device) -> dict[str, Any]:
    """Measure an epoch's time and memory from some of its steps, and the parts of a step."""
    dataset = load_dataset(Path(config.dataset), config.protocol)
    placement = "pinned" if device.type == "cuda" else "auto"
    precision = resolve_precision(config, device)
    with on(device), ExitStack() as opened:
        with PeakMemory(MEMORY_EVERY) as memory:
            watch = Stopwatch(device)
            source, _ = opened.enter_context(open_source(config, dataset, device, placement, precision))
            watch.lap("opening")
            trainer = Trainer(config, dataset.sequences, source, device, precision)
            figures = timed_epoch(trainer, steps)
        peaks = peak_figures(memory, device)
        return {
            "opening_s": watch.seconds["opening"],
            **figures,
            **peaks,
            **profile(trainer, min(PROFILED, steps)),
        }


def timed_epoch(trainer: Trainer, steps: int) -> dict[str, float]:
    """Return the seconds of an epoch, scaled from that many steps, and the mean loss over their rows."""
    trainer.model.train()
    with deterministic():
        take(trainer, steps if trainer.device.type == "cuda" else min(steps, WARM_UP_STEPS))
        trainer.step.read()
        watch = Stopwatch(trainer.device)
        take(trainer, steps)
        watch.lap("steps")
    reading = trainer.step.read()
    whole = steps_per_epoch(trainer.sequences, trainer.config.train.batch_users)
    return {"epoch_s": watch.seconds["steps"] * whole / steps, "loss": reading.loss / reading.rows}


def take(trainer: Trainer, steps: int) -> None:
    """Take the first steps of the first epoch."""
    with closing(trainer.batches(epoch=0)) as batches:
        for prepared in islice(batches, steps):
            trainer.take(prepared)
