"""Train a run: validate after each epoch, keep the best checkpoint, and test it once at the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import TUNING_METHODS, EvaluationConfig, RunConfig, TrainConfig
from ..data import Batch, RunPlan, Sequences, Shape, epoch_batches, load_dataset, padded_shape, steps_per_epoch
from ..errors import InputError
from ..evaluation import evaluate, headline_metrics, parameter_counts, popularity_baseline
from ..fingerprints import changed_settings
from ..models import build_recommender
from ..precision import Precision, resolve_precision
from ..progress import progress_bar
from ..runtime import fix_cublas_workspace
from ..settings_files import read_settings
from ..states import ItemSource, PlannedBatch, PreparedBatch, planned_batches, prepared_batches
from .checkpoints import (
    ITEM_VECTORS,
    RESTORE,
    adam_tensors,
    item_vectors,
    load_adam,
    load_weights,
    named_weights,
)
from .fused_step import CpuFusedStep, GpuFusedStep, fused_step_refusal
from .item_sources import dataset_again, open_source, refuse_changed_texts, refuse_missing_libraries
from .memory_budget import MemoryBudget
from .run_folder import RunFolder
from .training_step import CapturedStep, TrainingStep

LOGGER = logging.getLogger(__name__)
SELECTED_BY = 10  # K of the validation HR@K that chooses the best epoch
READ_EVERY = 50  # steps between two readings of the loss; the host waits for a reading


@dataclass
class Progress:
    """The state of a run after its last finished epoch."""

    epoch: int = 0  # number of finished epochs
    best_epoch: int = 0  # counted from 1; 0 if none is finished
    best_hr: float = -1.0  # validation HR@10 of the best epoch
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl

    @classmethod
    def of(cls, state: dict[str, Any], path: Path) -> Progress:
        """Return the progress from the state of a checkpoint. Raises InputError, naming the file, if it is not one."""
        expected = {field.name for field in fields(cls)}
        if state.keys() != expected:
            stored = ", ".join(map(str, state))
            raise InputError(f"{path}: expected the state {', '.join(sorted(expected))}, found {stored}; {RESTORE}")
        progress = cls(**state)
        if not progress._is_possible():
            raise InputError(f"{path}: expected the state of a run, found {json.dumps(state)[:80]}; {RESTORE}")
        return progress

    def _is_possible(self) -> bool:
        """Return True if the values have their types and agree with each other."""
        integers = type(self.epoch) is int and type(self.best_epoch) is int
        lines = isinstance(self.lines, list) and all(isinstance(line, dict) for line in self.lines)
        return (
            integers
            and lines
            and 0 <= self.best_epoch <= self.epoch == len(self.lines)
            and type(self.best_hr) in (int, float)
            and -1 <= self.best_hr <= 1
        )

    def finished(self, config: TrainConfig) -> bool:
        """Return True after the last epoch, or after more than `patience` epochs without a better one."""
        return self.epoch >= config.max_epochs or self.epoch - self.best_epoch > config.patience


def train(
    config: RunConfig,
    out: Path | RunFolder,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    placement: str = "auto",
) -> dict[str, Any]:
    """Train a new run, write it into the folder `out`, and return its test figures.

    out: a path, or a RunFolder; `path` of a numbered one is then the folder really used. on_epoch: called with each
    finished epoch's line of metrics.jsonl. placement: where the feature table lies, one of config.PLACEMENTS. Raises
    InputError for input that cannot be used, if memory does not suffice, or if the loss is not finite. Nothing is
    written before the dataset, the states and the model are loaded.
    """
    fix_cublas_workspace()
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    precision = check_new_run(config, folder.path, device)
    dataset = load_dataset(Path(config.dataset), config.protocol)
    refuse_changed_texts(config, dataset)
    with open_source(config, dataset, device, placement, precision) as (source, views):
        trainer = Trainer(config, dataset.sequences, source, device, precision)
        trainer.refuse_unfit_form()
        with folder:
            folder.begin(trainer.config, views, dataset.sequences, device)
            return trainer.run(folder, on_epoch)


def check_new_run(config: RunConfig, out: Path, device: torch.device) -> Precision:
    """Return the precision of a new run in the folder `out`.

    Raises InputError if the folder is in use, if a library is missing, or if the device does not offer the precision.
    Nothing is read or written.
    """
    RunFolder(out).refuse_if_used()
    refuse_missing_libraries(config)
    return resolve_precision(config, device)


def resume(
    out: Path,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    placement: str = "auto",
) -> dict[str, Any]:
    """Continue a stopped run, with the results that it would have had without the stop, and return its test figures.

    A finished run returns its stored figures. on_epoch, placement: as in `train`. Raises InputError if `out` holds no
    run, or if the run's dataset, states or checkpoint have changed or are missing; nothing is written in these cases.
    """
    fix_cublas_workspace()
    folder = RunFolder.open(out)
    if folder.test.exists():
        LOGGER.info("%s is finished already", out)
        return read_settings(folder.test)
    config = folder.config
    precision = _precision_again(folder, device)
    if differences := folder.other_rounding(device):
        LOGGER.warning(
            "%s: %s; results will differ in rounding from those of a run that was not stopped",
            out,
            "; ".join(differences),
        )
    dataset = dataset_again(config, folder.sequences)
    with folder.hold(), open_source(config, dataset, device, placement, precision) as (source, views):
        for name, recorded in folder.views.items():
            if changed := changed_settings(recorded, views[name]):
                raise InputError(
                    f"{out}: view {name!r} has changed since the run began: {'; '.join(changed)}; restore it"
                )
        trainer = Trainer(config, dataset.sequences, source, device, precision)
        folder.remove_leftovers()
        if folder.has_checkpoint:
            trainer.restore(folder)
        return trainer.run(folder, on_epoch)


class Trainer:
    """One run in memory: the model, its optimizer step, the data and the progress."""

    def __init__(
        self, config: RunConfig, sequences: Sequences, source: ItemSource, device: torch.device, precision: Precision
    ) -> None:
        """Build the model and its step, and plan the memory of the batches.

        source: the items, from `open_source`. precision: from `check_new_run`. Raises InputError if the memory does not
        suffice.
        """
        self.config = config
        self.sequences = sequences
        self.source = source
        self.device = device
        tuned = config.model.method in TUNING_METHODS
        self.model = build_recommender(source, config, sequences.popularity, precision).to(device)
        self.step: CpuFusedStep | GpuFusedStep | TrainingStep
        self.plan: RunPlan | None = None  # of packed batches, for a fused step on a GPU
        self.captured: CapturedStep | None = None  # a step by autograd in a CUDA graph
        self._choose_step(precision.products)
        self.memory = MemoryBudget(config, sequences, source, self.model, device)
        if tuned:  # record it, so that a resumed run encodes in the same parts
            uncached = replace(config.uncached, items_at_once=self.memory.encoding.items_at_once)
            self.config = replace(config, uncached=uncached)
        self.progress = Progress()

    def _choose_step(self, products: torch.dtype) -> None:
        """Take fused steps, or steps by autograd if a fused step cannot train the model; the log says why."""
        train = self.config.train
        if reason := fused_step_refusal(self.model, self.device, products):
            LOGGER.info("training by autograd: %s", reason)
            tuned = self.config.model.method in TUNING_METHODS
            self.step_by_autograd(captured=self.device.type == "cuda" and not tuned)
            return
        LOGGER.debug("training by fused steps: they take the model's sizes on %s", self.device.type)
        if self.device.type == "cpu":
            self.step = CpuFusedStep(self.model, train.learning_rates)
        else:
            self.plan = RunPlan.of(self.sequences, train.batch_users, train.seed)
            self.step = GpuFusedStep(self.model, train.learning_rates, self.source, self.plan, products)

    def step_by_autograd(self, captured: bool) -> None:
        """Switch to steps by autograd, which can train every model. captured: whether a CUDA graph replays them."""
        self.plan = None
        self.step = TrainingStep(self.model, self.config.train.learning_rates, self.device)
        self.captured = CapturedStep(self.step) if captured else None

    def refuse_unfit_form(self) -> None:
        """Raise InputError if the environment names a form of the ops that cannot run this model.

        One item and one history are encoded to find out. Without this check, the first validation would fail after an
        epoch.
        """
        _, form = kernels.named_form()
        if form == "auto":
            return
        self.model.eval()
        inputs = np.zeros((1, self.sequences.max_inputs), dtype=np.int64)
        inputs[0, -1] = 1
        item = torch.ones(1, dtype=torch.int64, device=self.source.index_device)
        try:
            self.model.user_states(self.model.item_vectors(self.source, item), inputs)
        except kernels.FormError as error:
            raise InputError(str(error)) from None

    def run(self, folder: RunFolder, on_epoch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Train until the early stop or the last epoch, test the best checkpoint, and return the test figures.

        folder: takes the checkpoints, metrics and test figures. on_epoch: as in `train`. Raises InputError if the loss
        is not finite or memory does not suffice.
        """
        with deterministic():
            while not self.progress.finished(self.config.train):
                self._epoch(folder)
                on_epoch(self.progress.lines[-1])
            result = self._test(folder)
        folder.write_test(result)
        return result

    def restore(self, folder: RunFolder) -> None:
        """Load the checkpoint of the run's last finished epoch. Raises InputError if it does not fit the model."""
        tensors, state, path = folder.load_last(Progress.of)
        load_weights(self.model, tensors, path)
        load_adam(self.model, self.step.optimizer, tensors, path)
        self.progress = Progress.of(state, path)
        # The run may have been killed after it wrote the checkpoint and before it wrote the metrics.
        folder.write_metrics(self.progress.lines)

    def _epoch(self, folder: RunFolder) -> None:
        """Train and validate one epoch, and write its checkpoints and metrics.

        Raises InputError, with the epoch, if the loss or a score is not finite, memory lacks, or a form fails.
        """
        progress = self.progress
        started = time.perf_counter()
        try:
            with self.memory.refuse_lack_of_memory():
                loss = self._train_epoch()
                trained = time.perf_counter()
                vectors, report = self._validate()
        except (InputError, kernels.FormError) as error:
            left = f"the checkpoint of epoch {progress.epoch} is kept" if progress.epoch else "no epoch was finished"
            raise InputError(f"{folder.path}: stopped in epoch {progress.epoch + 1}: {error}; {left}") from None
        progress.epoch += 1
        hr = headline_metrics(report)[f"hr@{SELECTED_BY}"]
        improved = hr > progress.best_hr
        if improved:
            progress.best_epoch = progress.epoch
            progress.best_hr = hr
        progress.lines.append(
            {
                "epoch": progress.epoch,
                "loss": loss,
                "best": improved,
                "train_seconds": trained - started,
                "validation_seconds": time.perf_counter() - trained,
                "items_per_second": self.sequences.epoch_interactions / (trained - started),
                "validation": report,
            }
        )
        if improved:
            tensors = {**named_weights(self.model), ITEM_VECTORS: vectors}
            folder.save_best(tensors, {"epoch": progress.epoch})
        # The last checkpoint also holds the metrics, so that both agree after a crash.
        tensors = {**named_weights(self.model), **adam_tensors(self.model, self.step.optimizer)}
        folder.save_last(tensors, asdict(progress))
        folder.write_metrics(progress.lines)

    def _train_epoch(self) -> float:
        """Take the steps of one epoch, and return the mean loss over its rows."""
        self.model.train()
        total = 0.0
        rows = 0
        steps = steps_per_epoch(self.sequences, self.config.train.batch_users)
        with (
            progress_bar(f"epoch {self.progress.epoch + 1}", self.sequences.epoch_interactions, "items") as advance,
            closing(self.batches(self.progress.epoch)) as batches,  # closed before the source is, also after an error
        ):
            for done, prepared in enumerate(batches, start=1):
                self.take(prepared)
                note = ""
                if done % READ_EVERY == 0 or done == steps:
                    loss, count = self._read()
                    total, rows = total + loss, rows + count
                    note = f"loss {total / rows:.4f}, step {done} of {steps}"
                advance(prepared.slots, note=note)
        if isinstance(self.step, CpuFusedStep):
            self.step.release()  # validation may need its memory
        return total / rows

    def batches(self, epoch: int) -> Generator[PreparedBatch | PlannedBatch, None, None]:
        """Yield an epoch's batches, prepared ahead of their steps. epoch: counted from 0."""
        if self.plan is not None:
            return planned_batches(self.plan, epoch, self.source, self.device)
        config = self.config.train
        return self.prepared(epoch_batches(self.sequences, config.batch_users, config.seed, epoch))

    def prepared(self, batches: Iterator[Batch]) -> Generator[PreparedBatch, None, None]:
        """Yield batches on the device, prepared ahead of their steps; all of one shape if a graph replays the step."""
        shape = self.padded_shape if self.captured is not None else None
        return prepared_batches(batches, self.source, self.device, shape)

    @cached_property
    def padded_shape(self) -> Shape:
        """Return the shape to which all batches of this run can be padded."""
        return padded_shape(self.sequences, self.config.train.batch_users)

    def take(self, prepared: PreparedBatch | PlannedBatch) -> Tensor:
        """Take one optimizer step, and return the loss before its update, a scalar on the device.

        Raises InputError if the device's memory does not suffice.
        """
        with self.memory.refuse_lack_of_memory():
            if isinstance(prepared, PlannedBatch):
                return self.step(prepared)
            return (self.captured or self.step)(prepared.batch, prepared.item_inputs)

    def _read(self) -> tuple[float, int]:
        """Return the sum of losses and the number of rows since the last call.

        Raises InputError if a loss was not finite.
        """
        reading = self.step.read()
        if reading.failed_step is not None:
            raise InputError(f"step {reading.failed_step}: the loss is {reading.failed_loss}; lower the learning rates")
        return reading.loss, reading.rows

    def _validate(self) -> tuple[Tensor, dict[str, Any]]:
        """Return the vectors of all items, and the metrics on the validation set."""
        self.model.eval()
        vectors = self.model.catalogue_vectors(self.source)
        config = self.config.evaluation
        config = replace(config, ks=tuple(sorted({*config.ks, SELECTED_BY})))
        return vectors, self._report(vectors, "validation", config)

    def _test(self, folder: RunFolder) -> dict[str, Any]:
        """Load the best checkpoint, and return its figures on the test set."""
        tensors, state = folder.load_best()
        load_weights(self.model, tensors, folder.best)
        vectors = item_vectors(tensors, len(self.sequences.item_ids), self.config.model.embedding_dim, folder.best).to(
            self.device
        )
        self.model.eval()
        return {
            "method": self.config.model.method,
            "best_epoch": state["epoch"],
            "epochs": self.progress.epoch,
            "trainable_parameters": parameter_counts(self.model)["trainable"],
            "test": self._report(vectors, "test", self.config.evaluation),
            "popularity": popularity_baseline(self.sequences, "test", self.config.evaluation),
        }

    def _report(self, vectors: Tensor, split: str, config: EvaluationConfig) -> dict[str, Any]:
        """Return the metrics of item vectors on a split."""
        states = self.model.user_states(vectors, self.sequences.split(split).inputs)
        return evaluate(states, vectors, self.sequences, split, config)


def _precision_again(folder: RunFolder, device: torch.device) -> Precision:
    """Return the precision of a resumed run. Raises InputError, naming the folder, if the device does not offer it."""
    try:
        return resolve_precision(folder.config, device)
    except InputError as error:
        raise InputError(f"{folder.path}: {error}") from None


@contextmanager
def deterministic() -> Iterator[None]:
    """Make torch compute the same bits inside the context, for the same seed and machine.

    Enter it before the first product on CUDA: the cuBLAS variable that it sets is read once, and stays.
    """
    old_settings = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    fix_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no code here reads memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(old_settings[0])
        torch.utils.deterministic.fill_uninitialized_memory = old_settings[1]
