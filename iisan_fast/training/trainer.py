"""Hold a run in memory: its model, the step that trains it, the batches, and how far it has come."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
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
    batch_slots,
    epoch_batches,
    local_batches,
    padded_shape,
    steps_per_epoch,
    with_reversed_users,
)
from ..errors import InputError
from ..models import build_recommender
from ..precision import Precision
from ..ranks import ALONE, Ranks
from ..states import ItemSource, PlannedBatch, PreparedBatch, planned_batches, prepared_batches
from .checkpoints import (
    RESTORE,
    load_adam,
    load_averages,
    load_weights,
)
from .fused_step import CpuFusedStep, GpuFusedStep, fused_step_refusal
from .initial_weights import InitialWeights
from .learning_rates import RateSchedule
from .lost_best import refuse_lost_best
from .memory_budget import MemoryBudget
from .run_folder import RunFolder
from .run_progress import Progress
from .training_step import CapturedStep, TrainingStep
from .update_options import UpdateOptions

LOGGER = logging.getLogger(__name__)


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
        # Those that share out a batch's items: with local negatives each rank has a batch of its own users.
        self.item_ranks = ALONE if config.train.negatives == "local" else ranks
        tuned = config.model.method in TUNING_METHODS
        self.model = build_recommender(source, config, sequences.popularity, precision).to(device)
        if initial is not None:  # before the step is made, which may move the weights or begin averages with them
            initial.load_into(self.model, sequences.item_ids, sequences.training_counts)
        self.step: CpuFusedStep | GpuFusedStep | TrainingStep
        self.plan: RunPlan | None = None  # of packed batches, for a fused step on a GPU
        self.captured: CapturedStep | None = None  # a step by autograd in a CUDA graph
        self._choose_step(precision.products)
        self.memory = MemoryBudget(config, self.training_sequences, source, self.model, device, ranks)
        if tuned:  # record it, so that a resumed run encodes in the same parts
            uncached = replace(config.uncached, items_at_once=self.memory.encoding.items_at_once)
            self.config = replace(config, uncached=uncached)
        self.progress = Progress()
        self.steps_per_epoch = steps_per_epoch(self.training_sequences, config.train.batch_users)
        self.schedule = RateSchedule.of(config.train, self.steps_per_epoch)

    @property
    def has_local_batches(self) -> bool:
        """Return True if each of several ranks trains on the items of its own users alone."""
        return self.ranks.several and not self.item_ranks.several

    def _choose_step(self, products: torch.dtype) -> None:
        """Take fused steps, or steps by autograd if a fused step cannot train the model; the log says why."""
        train = self.config.train
        options = UpdateOptions.of(train)
        refusal = fused_step_refusal(self.model, self.device, products, self.negatives)
        if self.has_local_batches and self.device.type == "cuda":
            refusal = refusal or "a fused step on a GPU takes the negatives of all ranks, not local ones"
        if reason := next(filter(None, self.ranks.from_all(refusal)), ""):  # all ranks take one kind of step
            LOGGER.info("training by autograd: %s", reason)
            tuned = self.config.model.method in TUNING_METHODS
            self.step_by_autograd(captured=self.device.type == "cuda" and not tuned)
            return
        LOGGER.debug("training by fused steps: they take the model's sizes on %s", self.device.type)
        if self.device.type == "cpu":
            self.step = CpuFusedStep(self.model, train.learning_rates, options, self.ranks, self.item_ranks)
        else:
            own_mask = self.negatives.own_mask
            self.plan = RunPlan.of(self.training_sequences, train.batch_users, train.seed, own_mask, self.ranks)
            self.step = GpuFusedStep(
                self.model, train.learning_rates, self.source, self.plan, products, options=options
            )

    def step_by_autograd(self, captured: bool) -> None:
        """Switch to steps by autograd, which can train every model. captured: whether a CUDA graph replays them."""
        self.plan = None
        train = self.config.train
        options = UpdateOptions.of(train)
        self.step = TrainingStep(self.model, train.learning_rates, self.device, options, self.ranks, self.item_ranks)
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

    def schedule_rates(self) -> None:
        """Set the learning rates of the next step, if they change from step to step."""
        if self.config.train.scheduled:
            step = self.progress.epoch * self.steps_per_epoch + self.progress.under_way.steps
            self.step.scale_rates(self.schedule.factor(step))

    def batches(self, epoch: int, taken: int = 0) -> Generator[PreparedBatch | PlannedBatch, None, None]:
        """Yield an epoch's batches, prepared ahead of their steps.

        epoch: counted from 0. taken: the number of batches at its start that are left out.
        """
        if self.plan is not None:
            return planned_batches(self.plan, epoch, self.source, self.device, taken)
        train = self.config.train
        whole = self.training_sequences, train.batch_users, train.seed, epoch
        if self.has_local_batches:
            batches = local_batches(*whole, self.ranks, taken, self.negatives)
            return _with_slots(self.prepared(batches), batch_slots(*whole, taken))
        return self.prepared(epoch_batches(*whole, taken=taken, negatives=self.negatives))

    def prepared(self, batches: Iterator[Batch]) -> Generator[PreparedBatch, None, None]:
        """Yield batches on the device, prepared ahead of their steps; all of one shape if a graph replays the step."""
        shape = self.padded_shape if self.captured is not None else None
        return prepared_batches(batches, self.source, self.device, shape, self.item_ranks)

    @cached_property
    def padded_shape(self) -> Shape:
        """Return the shape to which all batches of this run, or this rank's shares of them, can be padded."""
        return padded_shape(self.training_sequences, self.config.train.batch_users, self.negatives, self.ranks)

    def take(self, prepared: PreparedBatch | PlannedBatch) -> Tensor:
        """Take one optimizer step, and return the loss before its update, a scalar on the device.

        Raises InputError if the device's memory does not suffice.
        """
        with self.memory.refuse_lack_of_memory():
            if isinstance(prepared, PlannedBatch):
                return self.step(prepared)
            return (self.captured or self.step)(prepared.batch, prepared.item_inputs)


def _with_slots(
    batches: Generator[PreparedBatch, None, None], slots: Iterator[int]
) -> Generator[PreparedBatch, None, None]:
    """Yield a rank's batches with the slots of all ranks' users. slots: of each batch."""
    with closing(batches):
        for prepared, count in zip(batches, slots):
            yield prepared._replace(slots=count)


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
