"""Sweeps: runs of several methods, sets of encoders and seeds, each trained by the same trainer.

A cell is one method with one seed over one set of encoders. It has a folder for its run and its figures, so that a
stopped sweep goes on at the cell, and at the epoch, where it stopped.
"""

from __future__ import annotations

import functools
import json
import socket
import statistics
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..config import (
    SIDE_METHODS,
    ExtractionConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
)
from ..data import load_dataset
from ..errors import InputError, first_few
from ..evaluation import headline_metrics
from ..precision import resolve_precision
from ..ranks import Ranks
from ..settings_files import read_settings
from ..states import extract
from ..training import RunFolder, Trainer, open_source, refuse_missing_libraries, resume, train
from .harness import Setup, write_result
from .machine import on
from .peak_memory import PeakMemory
from .phase_profile import profile
from .placed_work import Failure, placed_work
from .processes import in_a_process
from .samples import sample_users, users_to_draw_from
from .sweep_settings import SweepSettings, reads_a_cache, split_name
from .tables import NOT_MEASURED

K = 10
RECORD, TRAINED, FIGURES, ENCODING = "sweep.json", "trained.json", "figures.json", "encoding.json"
LONGEST_WAIT = timedelta(days=30)  # of a rank for the runs of others
MEMORY_EVERY = 1.0  # seconds between two looks, so that they cost an epoch little


@dataclass(frozen=True)
class Cell:
    """One method with one seed over one set of encoders."""

    encoders: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Return the cell's folder in the sweep's folder."""
        return out / self.encoders / self.method / f"seed-{self.seed}"

    def figures(self, out: Path) -> dict[str, Any]:
        """Read the figures of a finished cell."""
        return read_settings(self.folder(out) / FIGURES)


def run_sweep(setup: Setup, settings: SweepSettings) -> Path:
    """Train the cells that are not trained yet into the setup's folder, and return the folder.

    Several ranks share out the cells, and each cell is trained by one of them; they need one folder. Raises InputError
    if the folder holds another sweep, and at the end if cells failed; the figures of the others stay.
    """
    assert setup.dataset is not None and setup.folder is not None, "a sweep takes a dataset and a folder"
    dataset = setup.dataset
    out = setup.folder
    device = setup.device
    ranks = setup.ranks.apart(LONGEST_WAIT)
    cells = [Cell(*names) for names in product(settings.encoders, settings.methods, settings.seeds)]

    def prepare() -> Path:
        for cell in cells:  # what cannot be combined, or read, is refused before anything is written
            refuse_missing_libraries(cell_config(cell, dataset, out, settings))
        load_dataset(dataset)
        if settings.users is not None:
            users_to_draw_from(dataset, settings.users)
        _begin(out, dataset, settings, device)
        if settings.users is None:
            return dataset
        return sample_users(dataset, out / f"users-{settings.users}", settings.users)

    used = ranks.first_does(prepare)
    ranks.all_do(lambda: _refuse_missing(out / RECORD))
    unfinished = {str(cell.folder(out)): cell for cell in cells if not (cell.folder(out) / FIGURES).exists()}
    with on(device):
        not_encoded = _encode_sets([*unfinished.values()], used, out, settings, device, ranks)

        def run(cell: Cell) -> None:
            if reads_a_cache(cell.method) and cell.encoders in not_encoded:
                raise InputError(not_encoded[cell.encoders].message)
            _run_cell(cell, used, out, settings, device)

        failures = placed_work("sweep", unfinished, run, ranks)
    if failures:
        failed = [failure.phrase(name, ranks) for name, failure in failures.items()]
        count = f"{len(failed)} of {len(cells)} cells failed"
        raise InputError(f"{out}: {count} ({first_few(failed, len(failed))}); mend them or leave their methods out")
    return out


def cell_config(cell: Cell, dataset: Path, out: Path, settings: SweepSettings) -> RunConfig:
    """Return the configuration of a cell's run."""
    method, _ = split_name(cell.method)
    views = settings.encoders[cell.encoders]
    optimisation = TrainConfig(
        settings.batch_users, max_epochs=settings.epochs, patience=settings.patience, seed=cell.seed
    )
    make = functools.partial(RunConfig, str(dataset.resolve()), model=ModelConfig(method), train=optimisation)
    if method == "id":
        return make()
    if reads_a_cache(cell.method):
        return make(str(_cache(cell.encoders, out).resolve()), tuple(view.name for view in views))
    if method not in SIDE_METHODS:  # they read the final states alone
        views = tuple(replace(view, layers=None, layer_groups=None) for view in views)
    return make(uncached=UncachedConfig(views, missing_images=settings.missing_images, attention=settings.attention))


def encoding_seconds(encoders: str, out: Path) -> float | str:
    """Return the seconds in which a set's states were written into its cache.

    Returns NOT_MEASURED if that took several calls.
    """
    record = out / encoders / ENCODING
    return read_settings(record)["seconds"] if record.exists() else NOT_MEASURED


def _cache(encoders: str, out: Path) -> Path:
    """Return the folder of hidden states that the cells of one set of encoders share."""
    return out / encoders / "states"


def _begin(out: Path, dataset: Path, settings: SweepSettings, device: torch.device) -> None:
    """Record the sweep's settings. Raises InputError if the folder holds something else."""
    values = {"dataset": str(dataset.resolve()), "device": device.type, **asdict(settings)}
    values = json.loads(json.dumps(values))
    record = out / RECORD
    if record.exists():
        _refuse_another(record, values, out)
        values["encoders"] = read_settings(record)["encoders"] | values["encoders"]
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: expected an empty folder or a sweep to go on with, found other files")
    out.mkdir(parents=True, exist_ok=True)
    write_result(record, values)


def _refuse_another(record: Path, values: dict[str, Any], out: Path) -> None:
    """Raise InputError if cells were begun with other settings; more methods, encoders or seeds are allowed."""
    recorded = read_settings(record)
    if any(out.glob("*/*/seed-*")):
        for name in sorted(values.keys() - {"methods", "encoders", "seeds"}):
            if recorded.get(name) != values[name]:
                raise InputError(
                    f"{record}: {name} is {json.dumps(recorded.get(name))} there, {json.dumps(values[name])} now; "
                    "restore it or choose another folder"
                )
    for name in recorded["encoders"].keys() & values["encoders"].keys():
        if recorded["encoders"][name] != values["encoders"][name] and any(out.glob(f"{name}/*/seed-*")):
            raise InputError(f"{record}: the encoders {name!r} are others there; give these another name")


def _refuse_missing(record: Path) -> None:
    """Raise InputError if this rank does not have the file that rank 0 has written."""
    if not record.exists():
        raise InputError(
            f"{record}: a rank on {socket.gethostname()} does not have it; use a folder that all ranks have"
        )


def _encode_sets(
    cells: list[Cell], dataset: Path, out: Path, settings: SweepSettings, device: torch.device, ranks: Ranks
) -> dict[str, Failure]:
    """Fill the caches that cells read, each in a new process of one rank. Return the sets of encoders that failed."""
    configs = {cell.encoders: cell_config(cell, dataset, out, settings) for cell in cells if reads_a_cache(cell.method)}
    names = {name: name for name in configs}

    def encode(name: str) -> None:
        in_a_process(_encode, configs[name], settings, settings.encoders[name], out / name, device)

    return placed_work("encode", names, encode, ranks)


def _run_cell(cell: Cell, dataset: Path, out: Path, settings: SweepSettings, device: torch.device) -> None:
    """Train a cell in a new process, profile its steps in another, and write its figures; skip what is done already.

    out: the sweep's folder. Raises InputError if a process fails.
    """
    config = cell_config(cell, dataset, out, settings)
    folder = cell.folder(out)
    if not (folder / TRAINED).exists():
        in_a_process(_train, config, folder, settings.table, device)
    taken_apart = in_a_process(_profile, config, settings, device)
    write_result(folder / FIGURES, {**asdict(cell), **read_settings(folder / TRAINED), **taken_apart})


def _encode(
    config: RunConfig, settings: SweepSettings, views: tuple[ViewConfig, ...], folder: Path, device: torch.device
) -> None:
    """Write a set's states into its cache; record the seconds if that took one call."""
    dataset = load_dataset(Path(config.dataset), config.protocol)
    cache = Path(config.cache)
    started = time.perf_counter()
    done = extract(
        dataset,
        list(views),
        cache,
        device,
        ExtractionConfig(missing_images=settings.missing_images, attention=settings.attention),
    )
    if all(view.encoded == view.items for view in done):
        write_result(folder / ENCODING, {"seconds": time.perf_counter() - started})


def _train(config: RunConfig, folder: Path, table: str, device: torch.device) -> None:
    """Train a cell's run, or resume it, and write its figures beside it."""
    run = folder / "run"
    finished = RunFolder(run).test.exists()  # by a process that was killed before it could write the rest
    with PeakMemory(MEMORY_EVERY) as memory:
        if (run / "config.json").exists():
            result = resume(run, device, placement=table)
        else:
            result = train(config, run, device, placement=table)
    lines = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    figures = headline_metrics(result["test"])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.bytes
    trained = {
        "hr": figures[f"hr@{K}"],
        "ndcg": figures[f"ndcg@{K}"],
        "losses": [line["loss"] for line in lines],
        "best_epoch": result["best_epoch"],
        "epochs": result["epochs"],
        "trainable_parameters": result["trainable_parameters"],
        "epoch_s": statistics.median(line["train_seconds"] for line in lines[1:] or lines),
        "validation_s": statistics.median(line["validation_seconds"] for line in lines[1:] or lines),
        "peak_bytes": NOT_MEASURED if finished else peak or NOT_MEASURED,
    }
    write_result(folder / TRAINED, trained)


def _profile(config: RunConfig, settings: SweepSettings, device: torch.device) -> dict[str, Any]:
    """Return the seconds and memory of a step's phases, measured over a few steps of a run that is not kept."""
    dataset = load_dataset(Path(config.dataset), config.protocol)
    precision = resolve_precision(config, device)
    with open_source(config, dataset, device, settings.table, precision) as (source, _):
        return profile(Trainer(config, dataset.sequences, source, device, precision), settings.profiled)
