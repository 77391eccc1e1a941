"""Train a run: validate after each epoch, keep the best checkpoint, and test it once at the end.

The run is saved after each epoch, and within an epoch after the configured interval, and after the step under way if a
signal asks to stop. It goes on from there with the same results, bit for bit.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import kernels
from ..errors import InputError, Stopped, error_text
from ..evaluation import parameter_counts
from ..models import NeighbourTerms
from ..progress import progress_bar
from ..stop_signals import Interrupted, stop_requests
from .averaged_weights import averaged_weights
from .checkpoints import (
    RESTORE,
    adam_tensors,
    average_tensors,
    best_tensors,
    item_vectors,
    load_weights,
    named_weights,
)
from .determinism import deterministic
from .equal_weights import refuse_unequal_weights
from .fused_step import CpuFusedStep
from .run_folder import RunFolder
from .run_progress import SELECTED_BY
from .scoring import Scoring, TermWeights, split_states
from .shared_stop import SharedStop
from .trainer import Trainer
from .training_step import Reading

READ_EVERY = 50  # steps between two readings of the loss; the host waits for a reading


class TrainingLoop:
    """The epochs of a run, from where its trainer stands to the test."""

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        terms: NeighbourTerms,
        on_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        """Take the run in memory and its folder.

        folder: takes the checkpoints, metrics and test figures. terms: those in the folder. on_epoch: as in `train`.
        """
        self.trainer = trainer
        self.ranks = trainer.ranks
        self.folder = folder
        self.config = trainer.config
        self.scoring = Scoring(trainer.sequences, terms, trainer.device, trainer.ranks)
        self._on_epoch = on_epoch
        self._stop: SharedStop  # made by `run`
        self._saved = trainer.progress.place  # that of the last checkpoint; empty if there is none

    def run(self) -> dict[str, Any]:
        """Train until the early stop or the last epoch, test the best checkpoint, and return the test figures.

        Raises InputError if the loss is not finite, memory does not suffice, or a file cannot be written. Raises
        Stopped after a signal, when the run is saved.
        """
        exchange_every = 1 if self.trainer.device.type == "cpu" else READ_EVERY
        refuse_unequal_weights(self.ranks, self.trainer.model, "at the start")
        with stop_requests() as request, deterministic():
            self._stop = SharedStop(request, self.config.train.checkpoint_interval, self.ranks, exchange_every)
            while not self.trainer.progress.finished(self.config.train):
                if self._stop.agree():
                    raise self._stopped()
                self._epoch()
                if self.ranks.is_first:
                    self._on_epoch(self.trainer.progress.lines[-1])
            try:
                with self._stop.interruptible():
                    result = self._test()
            except Interrupted:
                raise self._stopped() from None
            self.folder.write_test(result)
        return result

    def _stopped(self) -> Stopped:
        """Return the exception for a signal: what is saved, and the command that goes on."""
        signal_number = self._stop.signal_number
        assert signal_number is not None
        saved = f"{self._saved} is saved" if self._saved else "there was nothing to save yet"
        command = f"iisan-fast train --resume {shlex.quote(str(self.folder.path))}"
        return Stopped(f"{self.folder.path}: {saved}; go on with {command}", signal_number)

    def _epoch(self) -> None:
        """Train and validate one epoch, and write its checkpoints and metrics.

        Raises InputError, with the epoch, if the loss or a score is not finite, memory lacks, a form fails, or a file
        cannot be written. Raises Stopped after a signal, when the run is saved.
        """
        number = self.trainer.progress.epoch + 1
        try:
            with self.trainer.memory.refuse_lack_of_memory():
                self._train_epoch()
                self._finish_epoch()
        except (InputError, kernels.FormError, OSError) as error:
            saved = (
                f"the checkpoint of {self._saved} is kept, and --resume goes on from it"
                if self._saved
                else "there is no checkpoint yet"
            )
            raise InputError(f"{self.folder.path}: stopped in epoch {number}: {error_text(error)}; {saved}") from None

    def _train_epoch(self) -> None:
        """Take the steps of the epoch that are left. Raises Stopped after a signal, when the run is saved."""
        trainer = self.trainer
        trainer.model.train()
        done = trainer.progress.epoch
        epoch = trainer.progress.under_way
        started = time.perf_counter() - epoch.seconds
        interactions = trainer.training_sequences.epoch_interactions
        with (
            progress_bar(f"epoch {done + 1}", interactions, "items") as advance,
            closing(trainer.batches(done, epoch.steps)) as batches,  # closed before the source is
        ):
            advance(epoch.slots)
            for prepared in batches:
                trainer.schedule_rates()
                trainer.take(prepared)
                epoch.steps += 1
                epoch.slots += prepared.slots
                note = ""
                if epoch.steps % READ_EVERY == 0 or epoch.steps == trainer.steps_per_epoch:
                    self._read()
                    note = f"loss {epoch.loss / epoch.rows:.4f}, step {epoch.steps} of {trainer.steps_per_epoch}"
                epoch.seconds = time.perf_counter() - started
                if self._stop.after_step(epoch.steps):
                    self._save()
                if self._stop.signal_number is not None:
                    raise self._stopped()
                advance(prepared.slots, note=note)
        if isinstance(trainer.step, CpuFusedStep):
            trainer.step.release()  # validation may need its memory

    def _finish_epoch(self) -> None:
        """Validate, and write the checkpoints and metrics of a finished epoch.

        Raises Stopped after a signal, when the run is saved. A validation under way is done again on resume. Raises
        InputError if the ranks' weights are not the same.
        """
        trainer = self.trainer
        progress = trainer.progress
        refuse_unequal_weights(self.ranks, trainer.model, f"after epoch {progress.epoch + 1}")
        trained = time.perf_counter()
        try:
            with averaged_weights(trainer.step.averages), self._stop.interruptible():
                vectors, report = self._validate()
        except Interrupted:
            self._save()
            raise self._stopped() from None
        progress.finish_epoch(report, time.perf_counter() - trained, trainer.training_sequences.epoch_interactions)
        if progress.best_epoch == progress.epoch:
            with averaged_weights(trainer.step.averages):
                tensors = best_tensors(trainer.model, vectors, trainer.source)
                self.folder.save_best(tensors, {"epoch": progress.epoch})
        self._save()  # it also holds the metrics, so that both agree after a crash
        self.folder.write_metrics(progress.lines)

    def _save(self) -> None:
        """Write the last checkpoint. Raises InputError if a loss was not finite, OSError if it cannot be written."""
        step = self.trainer.step
        model = self.trainer.model
        progress = self.trainer.progress
        record = step.record.cpu()
        _refuse_failed_step(Reading.of(record.clone()))
        progress.under_way.record = record.tolist()
        tensors = {**named_weights(model), **adam_tensors(model, step.optimizer)}
        tensors |= average_tensors(model, step.averages)
        self.folder.save_last(tensors, progress.as_state())
        self._saved = progress.place
        self._stop.restart_clock()

    def _read(self) -> None:
        """Add the losses since the last call to those of the epoch. Raises InputError if one was not finite."""
        reading = self.trainer.step.read()
        _refuse_failed_step(reading)
        epoch = self.trainer.progress.under_way
        epoch.loss += reading.loss
        epoch.rows += reading.rows

    def _validate(self) -> tuple[Tensor, dict[str, Any]]:
        """Return the vectors of all items, and the metrics on the validation set by the score with its terms."""
        trainer = self.trainer
        trainer.model.eval()
        self._stop.interrupt()
        vectors = trainer.model.catalogue_vectors(trainer.source, trainer.ranks)
        config = self.config.evaluation
        config = replace(config, ks=tuple(sorted({*config.ks, SELECTED_BY})))
        self._stop.interrupt()
        states = self._user_states(vectors, "validation")
        weights = TermWeights.of(self.config.scoring)
        self._stop.interrupt()
        return vectors, self.scoring.report(states, vectors, "validation", config, weights)

    def _test(self) -> dict[str, Any]:
        """Load the best checkpoint, and return its figures on the test set. Raises InputError if it does not fit."""
        trainer = self.trainer
        self._stop.interrupt()
        vectors = self.ranks.all_do(self._load_best).to(trainer.device)
        trainer.model.eval()
        evaluation = self.config.evaluation
        weights = TermWeights.of(self.config.scoring)
        if self.config.scoring.fit_terms:
            states = self._user_states(vectors, "validation")
            weights = self.scoring.fitted(states, vectors, evaluation, weights.cold_bias)
            self._stop.interrupt()
        return {
            "method": self.config.model.method,
            "best_epoch": trainer.progress.best_epoch,
            "epochs": trainer.progress.epoch,
            "trainable_parameters": parameter_counts(trainer.model)["trainable"],
            "test": self.scoring.report(self._user_states(vectors, "test"), vectors, "test", evaluation, weights),
            **self.scoring.baselines("test", evaluation),
            "scoring": weights._asdict(),
        }

    def _load_best(self) -> Tensor:
        """Load the best checkpoint's weights, and return its item vectors. Raises InputError if it does not fit."""
        trainer = self.trainer
        best = self.folder.best
        tensors, state = self.folder.load_best()
        best_epoch = trainer.progress.best_epoch
        if state["epoch"] != best_epoch:
            raise InputError(f"{best}: expected the best epoch, {best_epoch}, found epoch {state['epoch']}; {RESTORE}")
        load_weights(trainer.model, tensors, best)
        items = len(trainer.sequences.item_ids)
        return item_vectors(tensors, items, self.config.model.embedding_dim, best)

    def _user_states(self, vectors: Tensor, split: str) -> Tensor:
        """Return the user state for each target of a split, [R, d]."""
        return split_states(self.trainer.model, vectors, self.trainer.sequences.split(split), self.trainer.ranks)


def _refuse_failed_step(reading: Reading) -> None:
    """Raise InputError if the loss of a step was not finite."""
    if reading.failed_step is not None:
        raise InputError(f"step {reading.failed_step}: the loss is {reading.failed_loss}; lower the learning rates")
