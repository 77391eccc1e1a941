"""An epoch in which the encoders run in every step, by each attention, beside an epoch on cached states.

Encoders have random weights and images are noise: neither changes what a step costs. Every measurement is a process of
its own.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..config import RunConfig, TrainConfig, UncachedConfig
from ..data import Dataset, load_dataset, steps_per_epoch
from ..encoders import model_dtype, xformers_problem
from ..errors import InputError
from ..precision import resolve_precision
from ..progress import progress_bar
from ..training import Trainer, deterministic, open_source
from .cells import MEMORY_EVERY
from .machine import NOT_MEASURED, in_a_process, named_sequences, on, origin
from .peak_memory import PeakMemory
from .phase_profile import profile
from .stand_ins import stand_ins, state_shape
from .stopwatch import Stopwatch
from .train import VIEWS, WARM_UP_STEPS, TrainSettings, fill_store

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


@dataclass(frozen=True)
class UncachedSettings:
    """Of a benchmark."""

    users: int = 64  # a batch
    encoder_size: str = "base"  # of stand_ins.SHAPES
    steps: int | None = None  # of an epoch that are timed; None: all
    seed: int = 0


def benchmark(
    dataset: Path | None, settings: UncachedSettings, device: torch.device, keep: Path | None = None
) -> dict[str, Any]:
    """Uncached epochs by each attention, and a cached one, on a dataset's histories and titles or the embedded demo's.

    `keep` is where the stand-ins of encoders and images lie then, or lie already; None: they are not kept.
    """
    name, sequences = named_sequences(dataset)
    if settings.users > len(sequences.user_ids):
        raise InputError(f"--users {settings.users}: expected at most {len(sequences.user_ids)}, the users of {name}")
    whole = steps_per_epoch(sequences, settings.users)
    count = min(settings.steps or whole, whole)
    with TemporaryDirectory(prefix="iisan-fast-") as scratch:
        folder, views = stand_ins(dataset, keep or Path(scratch) / "stand-ins", settings.encoder_size, settings.seed)
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
        **origin(name, device),
        "settings": asdict(settings),
        "catalogue": len(sequences.item_ids),
        "steps_an_epoch": whole,
        "steps_timed": count,
        "scaled": count < whole,
        "notes": NOTES,
        "forms": rows,
    }


def unavailable(attention: str, device: torch.device) -> dict[str, Any] | None:
    """A row for an attention that is not to be had on the device; None for one that is."""
    problem = xformers_problem(device, model_dtype("auto", device)) if attention == "xformers" else None
    return problem and {"epoch_s": NOT_MEASURED, "why": problem}


def fill_cache(dataset: Dataset, settings: UncachedSettings, cache: Path) -> None:
    """Random states in the encoders' shape."""
    layers, width = state_shape(settings.encoder_size)
    fill_store(dataset, TrainSettings(layers=layers, width=width, seed=settings.seed), cache)


def measure(config: RunConfig, steps: int, device: torch.device) -> dict[str, Any]:
    """Measure an epoch's time and memory from some of its steps, and the parts of a step."""
    dataset = load_dataset(Path(config.dataset), config.protocol)
    placement, precision = "pinned" if device.type == "cuda" else "auto", resolve_precision(config, device)
    with on(device), ExitStack() as opened:
        with PeakMemory(MEMORY_EVERY) as memory:
            watch = Stopwatch(device)
            source, _ = opened.enter_context(open_source(config, dataset, device, placement, precision))
            watch.lap("opening")
            trainer = Trainer(config, dataset.sequences, source, device, precision)
            figures = timed_epoch(trainer, steps)
        cuda = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else NOT_MEASURED
        return {
            "opening_s": watch.seconds["opening"],
            **figures,
            "peak_pss_bytes": memory.bytes or NOT_MEASURED,
            "peak_cuda_bytes": cuda,
            **profile(trainer, min(PROFILED, steps)),
        }


def timed_epoch(trainer: Trainer, steps: int) -> dict[str, float]:
    """Seconds of an epoch, scaled from so many steps, and the mean loss over their rows."""
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
    """The first steps of the first epoch."""
    with closing(trainer.batches(epoch=0)) as batches:
        for prepared in islice(batches, steps):
            trainer.take(prepared)
