"""Methods side by side: each trained by the same trainer on the same batches, what it reaches and what it costs.

A cell is one method with one seed over one set of encoders; its run folder and its figures lie in a folder of its own,
so that a sweep that was stopped goes on at the cell, and in it at the epoch, where it stopped.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import (
    METHODS,
    STATE_METHODS,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
    read_settings,
)
from ..efficiency import TPME_WEIGHTS, tpme
from ..errors import InputError
from ..evaluate import gains, leading, target_ranks
from ..extract import extract
from ..files import write_atomically
from ..progress import progress_bar
from ..run_folder import RunFolder
from ..sequences import load_dataset
from ..significance import paired_test
from ..sources import open_source
from ..trainer import Trainer, load_best, precision, resume, train
from .machine import NOT_MEASURED, in_a_process, on, origin
from .memory import PeakMemory
from .profile import profile
from .samples import sample_users

LOGGER = logging.getLogger(__name__)
UNCACHED = "-uncached"  # after a method's name: its encoders run in every step although a cache could hold their states
K = 10
MEMORY_EVERY = 1.0  # seconds between two looks, so that they cost an epoch little
# Dearest first, as the paper finds them; within a group there is no order.
COST_ORDER = (("full",), ("lora", "adapter", "bitfit"), (f"iisan{UNCACHED}",), ("iisan",))


@dataclass(frozen=True)
class MethodsSettings:
    """Of a sweep."""

    methods: tuple[str, ...]  # of METHODS; with -uncached after it, one that could read a cache runs its encoders
    encoders: dict[str, tuple[ViewConfig, ...]]  # sets of views by name
    seeds: tuple[int, ...] = (0,)
    epochs: int = 100
    patience: int = 10
    batch_users: int = 64
    users: int | None = None  # a sample of them; None: all
    profiled: int = 10  # steps that are taken apart
    against: str | None = None  # the method that the others are tested against; None: the last one
    weights: tuple[float, float, float] = TPME_WEIGHTS
    missing_images: str = "error"
    attention: str = "auto"
    table: str = "auto"

    def __post_init__(self) -> None:
        if len(self.methods) < 2 or len(set(self.methods)) < len(self.methods):
            raise InputError(f"methods: expected two or more different ones, found {', '.join(self.methods) or 'none'}")
        for name in self.methods:
            method, uncached = split_name(name)
            if method not in METHODS or (uncached and method not in STATE_METHODS):
                allowed = [*METHODS, *(method + UNCACHED for method in STATE_METHODS)]
                raise InputError(f"methods: expected some of {', '.join(allowed)}, found {name!r}")
        if not self.encoders:
            raise InputError("encoders: expected at least one set of views, found none")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: expected different ones, found {self.seeds}")
        if self.against is not None and self.against not in self.methods:
            raise InputError(f"against: expected one of {', '.join(self.methods)}, found {self.against!r}")


@dataclass(frozen=True)
class Cell:
    """One method with one seed over one set of encoders."""

    encoders: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it lies."""
        return out / self.encoders / self.method / f"seed-{self.seed}"


def benchmark(dataset: Path, out: Path, settings: MethodsSettings, device: torch.device) -> dict[str, Any]:
    """Trains what of the sweep is not trained yet into the folder `out`, and returns all its figures.

    Raises InputError where `out` holds another sweep, or a cell cannot be run; finished cells are kept.
    """
    _begin(out, dataset, settings)
    name = dataset.resolve().name
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
    with progress_bar("methods", len(cells), "cells") as advance, on(device):
        for cell in cells:
            figures = cell.folder(out) / "figures.json"
            if not figures.exists():
                _run_cell(cell, dataset, out, settings, device, figures)
            advance(1, note=f"{cell.encoders} {cell.method} seed {cell.seed}")
    return {
        **origin(name, device),
        "settings": asdict(settings),
        "encoders": {name: summary(name, out, settings, device) for name in settings.encoders},
    }


def cell_config(cell: Cell, dataset: Path, out: Path, settings: MethodsSettings) -> RunConfig:
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


def summary(encoders: str, out: Path, settings: MethodsSettings, device: torch.device) -> dict[str, Any]:
    """One set of encoders: a row a method, their TPME, and whether time an epoch falls in the expected order."""
    found = {
        method: [read_settings(Cell(encoders, method, seed).folder(out) / "figures.json") for seed in settings.seeds]
        for method in settings.methods
    }
    against = settings.against or settings.methods[-1]
    users = {method: _user_gains(encoders, method, out, settings, device) for method in settings.methods}
    rows = {method: _row(figures) for method, figures in found.items()}
    for method, row in rows.items():
        row["p_value"] = None if method == against else paired_test(users[method], users[against])
    seconds, parameters, memory = (
        {method: row[name] for method, row in rows.items()}
        for name in ("epoch_s", "trainable_parameters", "peak_bytes")
    )
    if NOT_MEASURED not in memory.values():
        for method, share in tpme(seconds, parameters, memory, settings.weights).items():
            rows[method]["tpme"] = share
    return {"against": against, "methods": rows, "cost_order": cost_order(seconds)}


def cost_order(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Whether each method of a dearer group takes longer an epoch than each of the next, of those in the sweep."""
    groups = [{name: seconds[name] for name in group if name in seconds} for group in COST_ORDER]
    groups = [group for group in groups if group]
    violations = [
        f"{cheap} takes {below[cheap]:.2f} s, {dear} {above[dear]:.2f} s"
        for above, below in zip(groups, groups[1:])
        for dear in above
        for cheap in below
        if below[cheap] >= above[dear]
    ]
    return {
        "expected": " > ".join(", ".join(group) for group in groups),
        "holds": not violations,
        "violations": violations,
    }


def _row(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, deviations of the metrics, and the first seed's account of a step."""
    first = figures[0]
    peaks = [each["peak_bytes"] for each in figures]
    row = {name: statistics.mean(each[name] for each in figures) for name in ("hr", "ndcg", "epoch_s", "validation_s")}
    for name in ("hr", "ndcg"):
        row[f"{name}_sd"] = statistics.stdev(each[name] for each in figures) if len(figures) > 1 else None
    return {
        **row,
        "seeds": len(figures),
        "epochs": [each["epochs"] for each in figures],
        "losses": first["losses"],
        "encoding_s": first["encoding_s"],
        "trainable_parameters": first["trainable_parameters"],
        "parameters": first["parameters"],
        "peak_bytes": NOT_MEASURED if NOT_MEASURED in peaks else max(peaks),
        "memory_bytes": first["memory_bytes"],
        "phases_ms": first["phases_ms"],
    }


def _user_gains(encoders: str, method: str, out: Path, settings: MethodsSettings, device: torch.device) -> np.ndarray:
    """float64 [users]: what each test user adds to NDCG@10, the mean over seeds."""
    found = []
    for seed in settings.seeds:
        best = load_best(Cell(encoders, method, seed).folder(out) / "run", device)
        split = best.sequences.split("test")
        states = best.model.user_states(best.item_vectors, split.inputs)
        masked, _ = target_ranks(states, best.item_vectors, split, EvaluationConfig(ks=(K,)))
        found.append(gains(masked, K)[f"ndcg@{K}"])
    return np.mean(found, axis=0)


def _begin(out: Path, dataset: Path, settings: MethodsSettings) -> None:
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
    # More methods, encoders or seeds only add cells, and how they are compared is not what they are trained with.
    added = ("methods", "encoders", "seeds", "against", "weights")
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


def _run_cell(
    cell: Cell, dataset: Path, out: Path, settings: MethodsSettings, device: torch.device, figures: Path
) -> None:
    """Trains a cell in a process of its own, takes its steps apart in another, and writes what they came to."""
    config = cell_config(cell, dataset, out, settings)
    encoding = NOT_MEASURED
    if config.cache is not None:
        views = settings.encoders[cell.encoders]
        encoding = in_a_process(_encode, config, views, settings.missing_images, settings.attention, device)
    trained = in_a_process(_train, config, cell.folder(out) / "run", settings.table, device)
    taken_apart = in_a_process(_profile, config, settings, device)
    result = {**asdict(cell), "encoding_s": encoding, **trained, **taken_apart}
    write_atomically(figures, (json.dumps(result, indent=1) + "\n").encode())


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


def _profile(config: RunConfig, settings: MethodsSettings, device: torch.device) -> dict[str, Any]:
    dataset = load_dataset(Path(config.dataset), config.protocol)
    products = precision(config.train, device)
    with open_source(config, dataset, device, settings.table, products) as (source, _):
        return profile(Trainer(config, dataset.sequences, source, device), settings.profiled)
