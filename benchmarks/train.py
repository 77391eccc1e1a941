"""Training steps beside the dense reference: time, launches, memory, and the difference of the losses.

All forms begin with the same weights and take the same batches with the same dropout. They take turns in one process.
Whole epochs, and their memory, are measured in a new process each.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import ModelConfig, RunConfig, TrainConfig
from ..data import Dataset, Sequences, epoch_batches, load_dataset, steps_per_epoch
from ..errors import InputError
from ..models import build_recommender
from ..precision import resolve_precision
from ..progress import progress_bar
from ..ranks import ALONE, Ranks
from ..states import FeatureTable, Store, content_digest
from ..training import Trainer, deterministic, train
from .captures import capture_step
from .dense import DenseTrainer
from .harness import Setup
from .machine import count_launches, on, peak_figures, synchronise
from .peak_memory import PeakMemory
from .processes import in_a_process
from .settings import TrainSettings, refuse_more
from .stopwatch import quantiles
from .tables import NOT_MEASURED

VIEWS = ("first", "second")
WARM_UP_STEPS = 3
NOTED_ABOVE = 1e-4  # relative difference of a loss in fp32, which the row then remarks on; 9.9e-5 has been seen
REFUSED_ABOVE = 1e-3  # such a form computes something else
NOTES = {
    "dense": "padded slots, every slot encoded, the kept layers alone, heads one map after the other, a loop over "
    "users and positions in the loss, fp32 features in memory, PyTorch's Adam; its dropout is hashed as the fast "
    "path's, so that the losses can be compared",
    "float32": "iisan-fast train --precision float32",
    "bfloat16": "iisan-fast train --precision bfloat16, on CUDA",
    "reference ops": "the fast path with every op by its specification (IISAN_FAST_FORM=reference), float32",
    "eager": "the fast path without a CUDA graph, bfloat16",
    "step": "one step by the wall clock, its batch prepared ahead where the form does so; the forms take turns",
    "epoch": "as many steps as an epoch has, after some to warm up (an epoch of them for eager forms on CUDA), in a "
    "process of its own; its peak is the largest sum of proportional set sizes, the features and the imports included",
    "capture": "seconds to capture the step in a CUDA graph, before any step is timed",
    "run": "iisan-fast train: one epoch, validation and test, from a store of the same states. seconds: all of it, "
    "from reading the dataset and the store to the test, captures on CUDA included; C++ is compiled before. train_s, "
    "validation_s: of the epoch's steps, and of its validation",
}


@dataclass(frozen=True)
class TrainingForm:
    """A way to train. The dense reference has the precision None."""

    precision: str | None
    ops: str | None = None  # the form of the ops, in place of the choice by device
    captured: bool = True  # in a CUDA graph, on CUDA
    follows: bool = True  # its losses must be the dense reference's; False: their difference is reported alone
    needs_cuda: bool = False

    def runs_on(self, device: torch.device) -> bool:
        """Return True if the form can run on a device."""
        return device.type == "cuda" or not self.needs_cuda

    def warm_up_steps(self, epoch_steps: int, device: torch.device) -> int:
        """Return how many steps go before those of an epoch that is timed.

        An eager form on CUDA takes a whole epoch: Triton compiles a kernel again for sizes that divide otherwise.
        """
        eager = self.precision is not None and not self.captured and device.type == "cuda"
        return epoch_steps if eager else WARM_UP_STEPS


FORMS = {
    "dense": TrainingForm(None),
    "reference ops": TrainingForm("float32", ops="reference"),
    "float32": TrainingForm("float32"),
    "bfloat16": TrainingForm("bfloat16", follows=False, needs_cuda=True),
    "eager": TrainingForm("bfloat16", captured=False, follows=False, needs_cuda=True),
}

Step = Callable[[], Tensor]  # takes the next batch and returns its loss


@dataclass(frozen=True)
class Started:
    """A form at its first weights, before its first batch."""

    step: Step
    capture: Callable[[], float | str]  # returns the seconds; trains nothing


def compare_training(setup: Setup, settings: TrainSettings) -> dict[str, Any]:
    """Measure every form on random states. Raises InputError where a form's losses leave the dense reference's."""
    sequences = setup.sequences
    device = setup.device
    refuse_more("--users", settings.users, len(sequences.user_ids), f"the users of {setup.name}")
    forms = {name: form for name, form in FORMS.items() if form.runs_on(device)}
    with on(device):
        rows = side_by_side(forms, sequences, settings, device)
    epochs: dict[str, dict[str, Any]] = {}
    run: Any = NOT_MEASURED
    if settings.epochs:
        with progress_bar("epochs", len(forms) + 1, "processes") as advance:
            for name in forms:
                epochs[name] = in_a_process(epoch, name, sequences, settings, device)
                advance(1, name)
            if setup.dataset is not None:
                run = in_a_process(whole_run, load_dataset(setup.dataset), settings, device)
            advance(1)
    return {
        "catalogue": len(sequences.item_ids),
        "steps_an_epoch": steps_per_epoch(sequences, settings.users),
        "notes": {name: NOTES[name] for name in (*forms, "step", "epoch", "capture", "run")},
        "forms": [{"form": name, **rows[name], **epochs.get(name, {"epoch_s": NOT_MEASURED})} for name in forms],
        "run": run,
    }


def side_by_side(
    forms: dict[str, TrainingForm], sequences: Sequences, settings: TrainSettings, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Measure losses, step times and launches of every form, in one process.

    Raises InputError if a form that must follow the dense reference leaves it by more than REFUSED_ABOVE.
    """
    tables = random_states(sequences, settings)
    started = {name: start(form, sequences, tables, settings, device) for name, form in forms.items()}
    captures = {name: form.capture() for name, form in started.items()}
    steps = {name: form.step for name, form in started.items()}
    losses = {name: follow(step, settings.followed) for name, step in steps.items()}
    differences = {name: largest_difference(values, losses["dense"]) for name, values in losses.items()}
    remarks = {name: remark(name, form, differences[name], settings) for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    with progress_bar("steps", settings.rounds, "rounds") as advance:
        for _ in range(settings.rounds):
            for name, step in steps.items():
                times[name] += timed(step, settings.steps, device)
            advance(1)
    return {
        name: {
            **quantiles(times[name], "ms"),
            "ratio": float(np.median(times["dense"]) / np.median(times[name])),
            "largest_loss_difference": differences[name],
            **remarks[name],
            "capture_s": captures[name],
            "launches": count_launches(steps[name]) if device.type == "cuda" else NOT_MEASURED,
        }
        for name in forms
    }


def remark(name: str, form: TrainingForm, difference: float, settings: TrainSettings) -> dict[str, str]:
    """Return the remark of a row whose losses lie further from the dense reference's than fp32 usually leaves them.

    Raises InputError above REFUSED_ABOVE, and where the difference is no number.
    """
    if not form.follows or difference <= NOTED_ABOVE:
        return {}
    if not difference <= REFUSED_ABOVE:
        raise InputError(
            f"form {name!r}: its losses leave the dense reference's by {difference:.1e}, expected at most "
            f"{REFUSED_ABOVE:.0e} over {settings.followed} steps"
        )
    return {"remark": f"its losses leave the dense reference's by {difference:.1e}, more than {NOTED_ABOVE:.0e}"}


def start(
    form: TrainingForm,
    sequences: Sequences,
    tables: list[Tensor],
    settings: TrainSettings,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Started:
    """Make a form's model and trainer. Its step takes one batch after the other, epoch after epoch.

    ranks: those that train together, by a form of the fast path.
    """
    config = run_config(form, settings)
    precision = resolve_precision(config, device)
    if form.precision is None:
        source = FeatureTable(tuple(tables))
        model = build_recommender(source, config, sequences.popularity, precision).to(device).train()
        rates = config.train.learning_rates
        dense = DenseTrainer(model, [table.float().to(device) for table in tables], sequences, rates, settings.seed)
        users = dense_batches(sequences, config.train)
        return Started(lambda: dense.step(*next(users)), capture=lambda: NOT_MEASURED)
    with form_of_ops(form.ops):  # a trainer chooses its step by it
        trainer = new_trainer(form, sequences, tables, settings, device, ranks)
    batches = (prepared for epoch in range(config.train.max_epochs) for prepared in trainer.batches(epoch))

    def step() -> Tensor:
        with form_of_ops(form.ops), deterministic():
            return trainer.take(next(batches))

    def capture() -> float | str:
        with form_of_ops(form.ops), deterministic():
            return capture_step(trainer)

    return Started(step, capture)


def new_trainer(
    form: TrainingForm,
    sequences: Sequences,
    tables: list[Tensor],
    settings: TrainSettings,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Make the trainer of a form of the fast path, at its first weights."""
    config = run_config(form, settings)
    precision = resolve_precision(config, device)
    table = FeatureTable(tuple(table.to(device, precision.table) for table in tables))
    trainer = Trainer(config, sequences, table, device, precision, ranks=ranks)
    trainer.model.train()
    if not form.captured:
        trainer.step_by_autograd(captured=False)
    return trainer


def epoch(name: str, sequences: Sequences, settings: TrainSettings, device: torch.device) -> dict[str, Any]:
    """Time a form's steps of an epoch in this process, and take its memory; drawing the states does not count."""
    count = steps_per_epoch(sequences, settings.users)
    with on(device):
        form = start(FORMS[name], sequences, random_states(sequences, settings), settings, device)
        gc.collect()
        with PeakMemory() as memory:
            capture_s = form.capture()
            timed(form.step, FORMS[name].warm_up_steps(count, device), device)
            started = time.perf_counter()
            for _ in range(count):
                form.step()
            synchronise(device)
            seconds = time.perf_counter() - started
    return {"epoch_s": seconds, "capture_s": capture_s, **peak_figures(memory, device)}


def whole_run(dataset: Dataset, settings: TrainSettings, device: torch.device) -> dict[str, Any]:
    """Time `iisan-fast train` for one epoch, its states read from a store, and take the memory of its process."""
    with TemporaryDirectory(prefix="iisan-fast-") as folder:
        cache, out = Path(folder) / "states", Path(folder) / "run"
        in_a_process(fill_store, dataset, settings, cache)  # elsewhere, so that its memory does not count
        form = run_config(FORMS["float32"], settings)
        config = replace(
            form, dataset=str(dataset.root), cache=str(cache), train=replace(form.train, max_epochs=1, precision="auto")
        )
        kernels.form_on(torch.device("cpu"))  # compiles what runs on the CPU, if it is not there yet
        lines: list[dict[str, Any]] = []
        started = time.perf_counter()
        with PeakMemory() as memory:
            train(config, out, device, lines.append)
        return {
            "seconds": time.perf_counter() - started,
            "train_s": lines[0]["train_seconds"],
            "validation_s": lines[0]["validation_seconds"],
            "peak_pss_bytes": memory.bytes or NOT_MEASURED,
        }


def fill_store(dataset: Dataset, settings: TrainSettings, cache: Path) -> None:
    """Write random states into a store as extraction would."""
    tables = random_states(dataset.sequences, settings)
    item_ids = dataset.sequences.item_ids
    digests = [content_digest(title.encode()) for title in dataset.titles]
    described = {"source": "title", "unescaped": dataset.protocol.unescape_titles, "dtype": "bfloat16"}
    described |= {"layers": list(range(settings.layers)), "depth": settings.layers, "width": settings.width}
    with Store(cache, writable=True) as store:
        store.add_views({name: described for name in VIEWS})
        for name, table in zip(VIEWS, tables):
            store.write(name, item_ids, digests, table[1:])


def run_config(form: TrainingForm, settings: TrainSettings) -> RunConfig:
    """Return the configuration of IISAN at its published sizes."""
    train_config = TrainConfig(
        batch_users=settings.users, max_epochs=1_000_000, seed=settings.seed, precision=form.precision or "float32"
    )
    return RunConfig(dataset="", cache="", views=VIEWS, model=ModelConfig(), train=train_config)


def random_states(sequences: Sequences, settings: TrainSettings) -> list[Tensor]:
    """Draw two views' states of the whole catalogue: bf16 [items + 1, layers, width], row 0 zeros."""
    generator = torch.Generator().manual_seed(settings.seed)
    tables = [
        torch.empty(len(sequences.item_ids) + 1, settings.layers, settings.width, dtype=torch.bfloat16) for _ in VIEWS
    ]
    for table in tables:
        table.normal_(generator=generator)
        table[0] = 0
    return tables


def dense_batches(sequences: Sequences, config: TrainConfig) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the users and the step of every batch, in the order that training takes them."""
    for number in range(config.max_epochs):
        for batch in epoch_batches(sequences, config.batch_users, config.seed, number):
            yield batch.users.numpy(), batch.step


def follow(step: Step, count: int) -> list[float]:
    """Take that many steps and return their losses."""
    return [float(step()) for _ in range(count)]


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of any step; NaN where a loss is no number."""
    values, right = np.array(losses), np.array(expected)
    return float(np.max(np.abs(values - right) / np.abs(right)))


def timed(step: Step, count: int, device: torch.device) -> list[float]:
    """Return the milliseconds of each step; on CUDA their mean, since nothing waits between them."""
    synchronise(device)
    if device.type == "cuda":
        started = time.perf_counter()
        for _ in range(count):
            step()
        synchronise(device)
        return [1000 * (time.perf_counter() - started) / count]
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    return times


@contextmanager
def form_of_ops(name: str | None) -> Iterator[None]:
    """Let the environment name the form of the ops, for a while."""
    before = os.environ.get(kernels.FORM_VARIABLE)
    if name is not None:
        os.environ[kernels.FORM_VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(kernels.FORM_VARIABLE)
            if before is not None:
                os.environ[kernels.FORM_VARIABLE] = before
