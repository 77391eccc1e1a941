"""Train a run: validate after each epoch, keep the best checkpoint, and test it once at the end.

The run is saved after each epoch, and within an epoch after the configured interval, and after the step under way if a
signal asks to stop. It goes on from there with the same results, bit for bit.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import TUNING_METHODS, RunConfig
from ..data import (
    Batch,
    Negatives,
    RunPlan,
    Sequences,
    Shape,
    epoch_batches,
    padded_shape,
    steps_per_epoch,
    with_reversed_users,
)
from ..errors import InputError, Stopped, error_text
from ..evaluation import parameter_counts
from ..intervals import IntervalClock
from ..models import NeighbourTerms, build_recommender
from ..precision import Precision
from ..progress import progress_bar
from ..ranks import ALONE, Ranks
from ..states import ItemSource, PlannedBatch, PreparedBatch, planned_batches, prepared_batches
from ..stop_signals import Interrupted, StopRequest, stop_requests
from .averaged_weights import averaged_weights
from .checkpoints import (
    RESTORE,
    adam_tensors,
    average_tensors,
    best_tensors,
    item_vectors,
    load_adam,
    load_averages,
    load_weights,
    named_weights,
)
from .determinism import deterministic
from .fused_step import CpuFusedStep, GpuFusedStep, fused_step_refusal
from .initial_weights import InitialWeights
from .learning_rates import RateSchedule
from .lost_best import refuse_lost_best
from .memory_budget import MemoryBudget
from .run_folder import RunFolder
from .run_progress import SELECTED_BY, Progress
from .scoring import Scoring, TermWeights, split_states
from .training_step import CapturedStep, Reading, TrainingStep
from .update_options import UpdateOptions

LOGGER = logging.getLogger(__name__)
READ_EVERY = 50  # steps between two readings of the loss; the host waits for a reading


class Trainer:
    """One run in memory: the model, its optimizer step, the data and the progress."""

    def __init__(
        self,
        config: RunConfig,
        sequences: Sequences,
        source: ItemSource,
        device: torch.device,
        precision: Precision,
        initial: InitialWeights | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Build the model and its step, and plan the memory of the batches.

        source: the items, from `open_source`. precision: from `check_new_run`. initial: weights to begin with, in place
        of random ones. ranks: the processes that train together. Raises InputError if the memory does not suffice, or
        if the weights are of another model.
        """
        self.config = config
        self.ranks = ranks
        self.sequences = sequences
        self.training_sequences = with_reversed_users(sequences) if config.train.reverse else sequences
        self.source = source
        self.device = device
        self.negatives = _negatives(config, sequences)
        tuned = config.model.method in TUNING_METHODS
        self.model = build_recommender(source, config, sequences.popularity, precision).to(device)
        if initial is not None:  # before the step is made, which may move the weights or begin averages with them
            initial.load_into(self.model, sequences.item_ids, sequences.training_counts)
        self.step: CpuFusedStep | GpuFusedStep | TrainingStep
        self.plan: RunPlan | None = None  # of packed batches, for a fused step on a GPU
        self.captured: CapturedStep | None = None  # a step by autograd in a CUDA graph
        self._choose_step(precision.products)
        self.memory = MemoryBudget(config, self.training_sequences, source, self.model, device)
        if tuned:  # record it, so that a resumed run encodes in the same parts
            uncached = replace(config.uncached, items_at_once=self.memory.encoding.items_at_once)
            self.config = replace(config, uncached=uncached)
        self.progress = Progress()
        self.steps_per_epoch = steps_per_epoch(self.training_sequences, config.train.batch_users)
        self.schedule = RateSchedule.of(config.train, self.steps_per_epoch)
        self._clock = IntervalClock(config.train.checkpoint_interval)
        self.scoring: Scoring  # with the terms that `run` takes
        self._saved = ""  # the place of the last checkpoint; empty if there is none

    def _choose_step(self, products: torch.dtype) -> None:
        """Take fused steps, or steps by autograd if a fused step cannot train the model; the log says why."""
        train = self.config.train
        options = UpdateOptions.of(train)
        if reason := fused_step_refusal(self.model, self.device, products, self.negatives):
            LOGGER.info("training by autograd: %s", reason)
            tuned = self.config.model.method in TUNING_METHODS
            self.step_by_autograd(captured=self.device.type == "cuda" and not tuned)
            return
        LOGGER.debug("training by fused steps: they take the model's sizes on %s", self.device.type)
        if self.device.type == "cpu":
            self.step = CpuFusedStep(self.model, train.learning_rates, options)
        else:
            self.plan = RunPlan.of(self.training_sequences, train.batch_users, train.seed, self.negatives.own_mask)
            self.step = GpuFusedStep(
                self.model, train.learning_rates, self.source, self.plan, products, options=options
            )

    def step_by_autograd(self, captured: bool) -> None:
        """Switch to steps by autograd, which can train every model. captured: whether a CUDA graph replays them."""
        self.plan = None
        train = self.config.train
        self.step = TrainingStep(self.model, train.learning_rates, self.device, UpdateOptions.of(train))
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

    def run(
        self, folder: RunFolder, terms: NeighbourTerms, on_epoch: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Train until the early stop or the last epoch, test the best checkpoint, and return the test figures.

        folder: takes the checkpoints, metrics and test figures. terms: those in the folder. on_epoch: as in `train`.
        Raises InputError if the loss is not finite, memory does not suffice, or a file cannot be written. Raises
        Stopped after a signal, when the run is saved.
        """
        self.scoring = Scoring(self.sequences, terms, self.device)
        with stop_requests() as request, deterministic():
            self._clock.restart()
            while not self.progress.finished(self.config.train):
                if request.signal_number is not None:
                    raise self._stopped(folder, request.signal_number)
                self._epoch(folder, request)
                on_epoch(self.progress.lines[-1])
            try:
                with request.raised_at_once():
                    result = self._test(folder)
            except Interrupted:
                raise self._stopped(folder, request.signal_number) from None
            folder.write_test(result)
        return result

    def restore(self, folder: RunFolder) -> None:
        """Load the run's last checkpoint. Raises InputError if it does not fit the model or the data.

        A damaged best checkpoint is made again from it. Raises InputError if that is not possible.
        """
        tensors, state, path = folder.load_last(self._checked_progress)
        shape = (len(self.sequences.item_ids), self.config.model.embedding_dim)
        progress = Progress.of(state, path)
        refuse_lost_best(folder, progress, self.model, self.source, shape, self.steps_per_epoch)
        load_weights(self.model, tensors, path)
        load_adam(self.model, self.step.optimizer, tensors, path)
        load_averages(self.model, self.step.averages, tensors, path)
        self.progress = progress
        self.step.record.copy_(torch.tensor(self.progress.under_way.record, dtype=torch.float64))
        self._saved = self.progress.place

    def _checked_progress(self, state: dict[str, Any], path: Path) -> Progress:
        """Return the progress from a checkpoint's state. Raises InputError if it is not a state of this run."""
        progress = Progress.of(state, path)
        steps = progress.under_way.steps
        if steps > self.steps_per_epoch:
            raise InputError(
                f"{path}: expected at most {self.steps_per_epoch} steps of an epoch, found {steps}; {RESTORE}"
            )
        if steps == self.steps_per_epoch and not progress.under_way.is_read():
            raise InputError(f"{path}: expected the losses of an epoch's steps and their time, found none; {RESTORE}")
        return progress

    def _stopped(self, folder: RunFolder, signal_number: int) -> Stopped:
        """Return the exception for a signal: what is saved, and the command that goes on."""
        saved = f"{self._saved} is saved" if self._saved else "there was nothing to save yet"
        command = f"iisan-fast train --resume {shlex.quote(str(folder.path))}"
        return Stopped(f"{folder.path}: {saved}; go on with {command}", signal_number)

    def _epoch(self, folder: RunFolder, request: StopRequest) -> None:
        """Train and validate one epoch, and write its checkpoints and metrics.

        Raises InputError, with the epoch, if the loss or a score is not finite, memory lacks, a form fails, or a file
        cannot be written. Raises Stopped after a signal, when the run is saved.
        """
        number = self.progress.epoch + 1
        try:
            with self.memory.refuse_lack_of_memory():
                self._train_epoch(folder, request)
                self._finish_epoch(folder, request)
        except (InputError, kernels.FormError, OSError) as error:
            saved = (
                f"the checkpoint of {self._saved} is kept, and --resume goes on from it"
                if self._saved
                else "there is no checkpoint yet"
            )
            raise InputError(f"{folder.path}: stopped in epoch {number}: {error_text(error)}; {saved}") from None

    def _train_epoch(self, folder: RunFolder, request: StopRequest) -> None:
        """Take the steps of the epoch that are left. Raises Stopped after a signal, when the run is saved."""
        self.model.train()
        epoch = self.progress.under_way
        started = time.perf_counter() - epoch.seconds
        interactions = self.training_sequences.epoch_interactions
        with (
            progress_bar(f"epoch {self.progress.epoch + 1}", interactions, "items") as advance,
            closing(self.batches(self.progress.epoch, epoch.steps)) as batches,  # closed before the source is
        ):
            advance(epoch.slots)
            for prepared in batches:
                if self.config.train.scheduled:
                    self.step.scale_rates(
                        self.schedule.factor(self.progress.epoch * self.steps_per_epoch + epoch.steps)
                    )
                self.take(prepared)
                epoch.steps += 1
                epoch.slots += prepared.slots
                note = ""
                if epoch.steps % READ_EVERY == 0 or epoch.steps == self.steps_per_epoch:
                    self._read()
                    note = f"loss {epoch.loss / epoch.rows:.4f}, step {epoch.steps} of {self.steps_per_epoch}"
                epoch.seconds = time.perf_counter() - started
                if self._clock.step() or request.signal_number is not None:
                    self._save(folder)
                if request.signal_number is not None:
                    raise self._stopped(folder, request.signal_number)
                advance(prepared.slots, note=note)
        if isinstance(self.step, CpuFusedStep):
            self.step.release()  # validation may need its memory

    def _finish_epoch(self, folder: RunFolder, request: StopRequest) -> None:
        """Validate, and write the checkpoints and metrics of a finished epoch.

        Raises Stopped after a signal, when the run is saved. A validation under way is done again on resume.
        """
        progress = self.progress
        trained = time.perf_counter()
        try:
            with averaged_weights(self.step.averages), request.raised_at_once():
                vectors, report = self._validate()
        except Interrupted:
            self._save(folder)
            raise self._stopped(folder, request.signal_number) from None
        progress.finish_epoch(report, time.perf_counter() - trained, self.training_sequences.epoch_interactions)
        if progress.best_epoch == progress.epoch:
            with averaged_weights(self.step.averages):
                folder.save_best(best_tensors(self.model, vectors, self.source), {"epoch": progress.epoch})
        self._save(folder)  # it also holds the metrics, so that both agree after a crash
        folder.write_metrics(progress.lines)

    def _save(self, folder: RunFolder) -> None:
        """Write the last checkpoint. Raises InputError if a loss was not finite, OSError if it cannot be written."""
        record = self.step.record.cpu()
        _refuse_failed_step(Reading.of(record.clone()))
        self.progress.under_way.record = record.tolist()
        tensors = {**named_weights(self.model), **adam_tensors(self.model, self.step.optimizer)}
        tensors |= average_tensors(self.model, self.step.averages)
        folder.save_last(tensors, self.progress.as_state())
        self._saved = self.progress.place
        self._clock.restart()

    def batches(self, epoch: int, taken: int = 0) -> Generator[PreparedBatch | PlannedBatch, None, None]:
        """Yield an epoch's batches, prepared ahead of their steps.

        epoch: counted from 0. taken: the number of batches at its start that are left out.
        """
        if self.plan is not None:
            return planned_batches(self.plan, epoch, self.source, self.device, taken)
        config = self.config.train
        batches = epoch_batches(
            self.training_sequences, config.batch_users, config.seed, epoch, taken=taken, negatives=self.negatives
        )
        return self.prepared(batches)

    def prepared(self, batches: Iterator[Batch]) -> Generator[PreparedBatch, None, None]:
        """Yield batches on the device, prepared ahead of their steps; all of one shape if a graph replays the step."""
        shape = self.padded_shape if self.captured is not None else None
        return prepared_batches(batches, self.source, self.device, shape)

    @cached_property
    def padded_shape(self) -> Shape:
        """Return the shape to which all batches of this run can be padded."""
        return padded_shape(self.training_sequences, self.config.train.batch_users, self.negatives)

    def take(self, prepared: PreparedBatch | PlannedBatch) -> Tensor:
        """Take one optimizer step, and return the loss before its update, a scalar on the device.

        Raises InputError if the device's memory does not suffice.
        """
        with self.memory.refuse_lack_of_memory():
            if isinstance(prepared, PlannedBatch):
                return self.step(prepared)
            return (self.captured or self.step)(prepared.batch, prepared.item_inputs)

    def _read(self) -> None:
        """Add the losses since the last call to those of the epoch. Raises InputError if one was not finite."""
        reading = self.step.read()
        _refuse_failed_step(reading)
        self.progress.under_way.loss += reading.loss
        self.progress.under_way.rows += reading.rows

    def _validate(self) -> tuple[Tensor, dict[str, Any]]:
        """Return the vectors of all items, and the metrics on the validation set by the score with its terms."""
        self.model.eval()
        vectors = self.model.catalogue_vectors(self.source)
        config = self.config.evaluation
        config = replace(config, ks=tuple(sorted({*config.ks, SELECTED_BY})))
        states = self._user_states(vectors, "validation")
        weights = TermWeights.of(self.config.scoring)
        return vectors, self.scoring.report(states, vectors, "validation", config, weights)

    def _test(self, folder: RunFolder) -> dict[str, Any]:
        """Load the best checkpoint, and return its figures on the test set. Raises InputError if it does not fit."""
        tensors, state = folder.load_best()
        if state["epoch"] != self.progress.best_epoch:
            raise InputError(
                f"{folder.best}: expected the best epoch, {self.progress.best_epoch}, found epoch {state['epoch']}; "
                f"{RESTORE}"
            )
        load_weights(self.model, tensors, folder.best)
        vectors = item_vectors(tensors, len(self.sequences.item_ids), self.config.model.embedding_dim, folder.best).to(
            self.device
        )
        self.model.eval()
        evaluation = self.config.evaluation
        weights = TermWeights.of(self.config.scoring)
        if self.config.scoring.fit_terms:
            states = self._user_states(vectors, "validation")
            weights = self.scoring.fitted(states, vectors, evaluation, weights.cold_bias)
        return {
            "method": self.config.model.method,
            "best_epoch": state["epoch"],
            "epochs": self.progress.epoch,
            "trainable_parameters": parameter_counts(self.model)["trainable"],
            "test": self.scoring.report(self._user_states(vectors, "test"), vectors, "test", evaluation, weights),
            **self.scoring.baselines("test", evaluation),
            "scoring": weights._asdict(),
        }

    def _user_states(self, vectors: Tensor, split: str) -> Tensor:
        """Return the user state for each target of a split, [R, d]."""
        return split_states(self.model, vectors, self.sequences.split(split))


def _negatives(config: RunConfig, sequences: Sequences) -> Negatives:
    """Return the negatives of a run's loss. Raises InputError if more are drawn than items occur in training."""
    train = config.train
    kind, drawn = train.loss_and_negatives
    items = int(np.count_nonzero(sequences.training_counts))
    if drawn > items:
        raise InputError(
            f"loss: expected at most the {items} items that occur in training, found {drawn} negatives; "
            f"lower N of {kind}:N"
        )
    return Negatives.of(train)


def _refuse_failed_step(reading: Reading) -> None:
    """Raise InputError if the loss of a step was not finite."""
    if reading.failed_step is not None:
        raise InputError(f"step {reading.failed_step}: the loss is {reading.failed_loss}; lower the learning rates")
