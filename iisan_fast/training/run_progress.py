"""Describe how far a run has come: its finished epochs, and the steps of the epoch under way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import InputError
from ..evaluation import headline_metrics
from ..recorded_json import is_finite_number
from .checkpoints import RESTORE

SELECTED_BY = 10  # K of the validation HR@K that chooses the best epoch
RECORD_ENTRIES = 4  # of an optimizer step's record
UNDER_WAY = "under_way"  # an entry of a state that older checkpoints lack


@dataclass
class EpochProgress:
    """The state of an epoch under way, beside the weights and the optimizer's state."""

    steps: int = 0  # that are taken
    slots: int = 0  # items in the histories of their users
    loss: float = 0.0  # the sum of the losses of their rows, as far as the losses were read
    rows: int = 0  # whose losses were read
    record: list[float] = field(default_factory=lambda: [0.0] * RECORD_ENTRIES)  # of the optimizer step: not yet read
    seconds: float = 0.0  # that the steps took

    def is_possible(self) -> bool:
        """Return True if the values have their types."""
        return (
            all(map(_is_count, (self.steps, self.slots, self.rows)))
            and isinstance(self.record, list)
            and len(self.record) == RECORD_ENTRIES
            and all(map(is_finite_number, (self.loss, self.seconds, *self.record)))
            and self.seconds >= 0
        )

    def is_read(self) -> bool:
        """Return True if losses were read and the steps took time, as at the end of an epoch."""
        return self.rows > 0 and self.seconds > 0


@dataclass
class Progress:
    """The state of a run, beside the weights and the optimizer's state."""

    epoch: int = 0  # number of finished epochs
    best_epoch: int = 0  # counted from 1; 0 if none is finished
    best_hr: float = -1.0  # validation HR@10 of the best epoch
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    under_way: EpochProgress = field(default_factory=EpochProgress)  # the epoch after the finished ones

    @classmethod
    def of(cls, state: dict[str, Any], path: Path) -> Progress:
        """Return the progress from the state of a checkpoint. Raises InputError, naming the file, if it is not one."""
        epoch_state = state.get(UNDER_WAY, asdict(EpochProgress()))
        _refuse_other_names(cls, {**state, UNDER_WAY: epoch_state}, path)
        _refuse_other_names(EpochProgress, epoch_state, path)
        progress = cls(**{**state, UNDER_WAY: EpochProgress(**epoch_state)})
        if not (progress._is_possible() and progress.under_way.is_possible()):
            raise InputError(f"{path}: expected the state of a run, found {json.dumps(state)[:80]}; {RESTORE}")
        return progress

    def finish_epoch(self, report: dict[str, Any], validation_seconds: float, interactions: int) -> None:
        """End the epoch under way: add its line of metrics, and see whether it is the best so far.

        report: the metrics on the validation set. interactions: in an epoch.
        """
        epoch = self.under_way
        self.under_way = EpochProgress()
        self.epoch += 1
        hr = headline_metrics(report)[f"hr@{SELECTED_BY}"]
        improved = hr > self.best_hr
        if improved:
            self.best_epoch = self.epoch
            self.best_hr = hr
        self.lines.append(
            {
                "epoch": self.epoch,
                "loss": epoch.loss / epoch.rows,
                "best": improved,
                "train_seconds": epoch.seconds,
                "validation_seconds": validation_seconds,
                "items_per_second": interactions / epoch.seconds,
                "validation": report,
            }
        )

    def as_state(self) -> dict[str, Any]:
        """Return the state of a checkpoint, as JSON values, from which `of` makes this progress again."""
        return asdict(self)

    def finished(self, config: TrainConfig) -> bool:
        """Return True after the last epoch, or after more than `patience` epochs without a better one."""
        return self.epoch >= config.max_epochs or self.epoch - self.best_epoch > config.patience

    def last_epoch(self, config: TrainConfig) -> int | None:
        """Return the epoch after which a run with these settings would have ended; None if it would go on."""
        best_epoch = 0
        for epoch, line in enumerate(self.lines, start=1):
            if line.get("best"):
                best_epoch = epoch
            if Progress(epoch, best_epoch).finished(config):
                return epoch
        return None

    @property
    def place(self) -> str:
        """Return how far the run has come, such as "step 500 of epoch 3"; empty before the first step."""
        if self.under_way.steps:
            return f"step {self.under_way.steps} of epoch {self.epoch + 1}"
        return f"epoch {self.epoch}" if self.epoch else ""

    def _is_possible(self) -> bool:
        """Return True if the values of finished epochs have their types and agree with each other."""
        return (
            _is_count(self.epoch)
            and _is_count(self.best_epoch)
            and isinstance(self.lines, list)
            and all(isinstance(line, dict) for line in self.lines)
            and self.best_epoch <= self.epoch == len(self.lines)
            and is_finite_number(self.best_hr)
            and -1 <= self.best_hr <= 1
        )


def _refuse_other_names(cls: type[Progress] | type[EpochProgress], values: Any, path: Path) -> None:
    """Raise InputError unless the values have the names of the fields of a class."""
    expected = {field.name for field in fields(cls)}
    if not isinstance(values, Mapping) or values.keys() != expected:
        stored = ", ".join(map(str, values)) if isinstance(values, Mapping) else json.dumps(values)[:80]
        raise InputError(f"{path}: expected the state {', '.join(sorted(expected))}, found {stored}; {RESTORE}")


def _is_count(value: Any) -> bool:
    """Return True for a whole number from 0."""
    return type(value) is int and value >= 0
