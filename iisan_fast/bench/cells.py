"""Sweeps: runs of several methods, encoders and seeds, each trained by the same trainer and taken apart.

A cell is one method with one seed over one set of encoders; its run folder and its figures lie in a folder of its own,
so that a sweep that was stopped goes on at the cell, and in it at the epoch, where it stopped.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import (
    METHODS,
    STATE_METHODS,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
    read_settings,
)
from ..errors import InputError
from ..evaluate import leading
from ..extract import extract
from ..files import write_atomically
from ..progress import progress_bar
from ..run_folder import RunFolder
from ..sequences import load_dataset
from ..sources import open_source
from ..trainer import Trainer, precision, resume, train
from .machine import NOT_MEASURED, in_a_process, on
from .memory import PeakMemory
from .profile import profile
from .samples import sample_users

UNCACHED = "-uncached"  # after a method's name: its encoders run in every step although a cache could hold their states
K = 10
FIGURES = "figures.json"
MEMORY_EVERY = 1.0  # seconds between two looks, so that they cost an epoch little


@dataclass(frozen=True)
class SweepSettings:
    """Of a sweep."""

    methods: tuple[str, ...]  # of METHODS; with -uncached after it, one that could read a cache runs its encoders
    encoders: dict[str, tuple[ViewConfig, ...]]  # sets of views by name
    seeds: tuple[int, ...] = (0,)
    epochs: int = 100
    patience: int = 10
    batch_users: int = 64
    users: int | None = None  # a sample of them; None: all
    profiled: int = 10  # steps that are taken apart
    missing_images: str = "error"
    attention: str = "auto"
    table: str = "auto"

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(f"methods: expected different ones, found {', '.join(self.methods) or 'none'}")
        for name in self.methods:
            method, uncached = split_name(name)
            if method not in METHODS or (uncached and method not in STATE_METHODS):
                allowed = [*METHODS, *(method + UNCACHED for method in STATE_METHODS)]
                raise InputError(f"methods: expected some of {', '.join(allowed)}, found {name!r}")
        if not self.encoders:
            raise InputError("encoders: expected at least one set of views, found none")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: expected different ones, found {self.seeds}")


@dataclass(frozen=True)
class Cell:
    """One method with one seed over one set of encoders."""

    encoders: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it lies."""
        return out / self.encoders / self.method / f"seed-{self.seed}"

    def figures(self, out: Path) -> dict[str, Any]:
        """What it came to."""
        return read_settings(self.folder(out) / FIGURES)


def run_sweep(dataset: Path, out: Path, settings: SweepSettings, device: torch.device) -> None:
    """Trains what of the sweep is not trained yet, into the folder `out`.

    Raises InputError where `out` holds another sweep, or a cell cannot be run; finished cells are kept.
    """
    _begin(out, dataset, settings)
    cells = [
        Cell(encoders, method, seed)
        for encoders in settings.encoders
        for method in settings.methods
        for seed in settings.seeds
    ]
    for cell in cells:
        cell_config(cell, dataset, out, settings)  # what cannot be combined is refused before anything is trained
    if settings.users is not None:
        dataset = sample_users(dataset, out / "dataset", settings.users)
    with progress_bar("sweep", len(cells), "cells") as advance, on(device):
        for cell in cells:
            if not (cell.folder(out) / FIGURES).exists():
                _run_cell(cell, dataset, out, settings, device)
            advance(1, note=f"{cell.encoders} {cell.method} seed {cell.seed}")


def cell_config(cell: Cell, dataset: Path, out: Path, settings: SweepSettings) -> RunConfig:
    """The cell's run."""
    method, uncached = split_name(cell.method)
    views = settings.encoders[cell.encoders]
    model, train_config = (
        ModelConfig(method),
        TrainConfig(settings.batch_users, max_epochs=settings.epochs, patience=settings.patience, seed=cell.seed),
    )
    make = functools.partial(RunConfig, str(dataset.resolve()), model=model, train=train_config)
    if method == "id":
        return make()
    if method in STATE_METHODS and not uncached:
        return make(str((out / cell.encoders / "states").resolve()), tuple(view.name for view in views))
    return make(uncached=UncachedConfig(views, missing_images=settings.missing_images, attention=settings.attention))


def split_name(name: str) -> tuple[str, bool]:
    """(method, whether its encoders are to run although a cache could hold their states)."""
    return name.removesuffix(UNCACHED), name.endswith(UNCACHED)


def _begin(out: Path, dataset: Path, settings: SweepSettings) -> None:
    """Records what the sweep is of. Raises InputError where the folder holds something else."""
    values = json.loads(json.dumps({"dataset": str(dataset.resolve()), **asdict(settings)}))
    record = out / "sweep.json"
    if not record.exists():
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out}: expected an empty folder or a sweep to go on with, found other files")
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(record, (json.dumps(values, indent=1) + "\n").encode())
        return
    recorded = read_settings(record)
    added = ("methods", "encoders", "seeds")  # more of them are more cells
    for name in values.keys() - set(added):
        if recorded.get(name) != values[name]:
            raise InputError(
                f"{record}: {name} is {json.dumps(recorded.get(name))} there, {json.dumps(values[name])} now; "
                "restore it or choose another folder"
            )
    for name in recorded["encoders"].keys() & values["encoders"].keys():
        if recorded["encoders"][name] != values["encoders"][name]:
            raise InputError(f"{record}: the encoders {name!r} are others there; give these another name")
    recorded["encoders"] |= values["encoders"]
    values["encoders"] = recorded["encoders"]
    write_atomically(record, (json.dumps(values, indent=1) + "\n").encode())


def _run_cell(cell: Cell, dataset: Path, out: Path, settings: SweepSettings, device: torch.device) -> None:
    """Trains a cell in a process of its own, takes its steps apart in another, and writes what they came to."""
    config = cell_config(cell, dataset, out, settings)
    encoding = NOT_MEASURED
    if config.cache is not None:
        views = settings.encoders[cell.encoders]
        encoding = in_a_process(_encode, config, views, settings.missing_images, settings.attention, device)
    trained = in_a_process(_train, config, cell.folder(out) / "run", settings.table, device)
    taken_apart = in_a_process(_profile, config, settings, device)
    result = {**asdict(cell), "encoding_s": encoding, **trained, **taken_apart}
    write_atomically(cell.folder(out) / FIGURES, (json.dumps(result, indent=1) + "\n").encode())


def _encode(
    config: RunConfig, views: Sequence[ViewConfig], missing_images: str, attention: str, device: torch.device
) -> float | str:
    """Puts a set's states into its cache; seconds a catalogue, or not measured where they lay there."""
    dataset = load_dataset(Path(config.dataset), config.protocol)
    started = time.perf_counter()
    done = extract(dataset, list(views), Path(config.cache), device, missing_images=missing_images, attention=attention)
    whole = all(view.encoded == view.items for view in done)
    return time.perf_counter() - started if whole else NOT_MEASURED


def _train(config: RunConfig, run: Path, table: str, device: torch.device) -> dict[str, Any]:
    """Trains, or goes on training, a run."""
    with PeakMemory(MEMORY_EVERY) as memory:
        if (run / "config.json").exists():
            result = resume(run, device, placement=table)
        else:
            result = train(config, run, device, placement=table)
    lines = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    figures = leading(result["test"])
    on_cuda = device.type == "cuda"
    return {
        "hr": figures[f"hr@{K}"],
        "ndcg": figures[f"ndcg@{K}"],
        "losses": [line["loss"] for line in lines],
        "best_epoch": result["best_epoch"],
        "epochs": result["epochs"],
        "trainable_parameters": result["trainable_parameters"],
        "epoch_s": statistics.median(line["train_seconds"] for line in lines[1:] or lines),
        "validation_s": statistics.median(line["validation_seconds"] for line in lines[1:] or lines),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else memory.bytes or NOT_MEASURED,
    }


def _profile(config: RunConfig, settings: SweepSettings, device: torch.device) -> dict[str, Any]:
    dataset = load_dataset(Path(config.dataset), config.protocol)
    products = precision(config.train, device)
    with open_source(config, dataset, device, settings.table, products) as (source, _):
        return profile(Trainer(config, dataset.sequences, source, device), settings.profiled)
