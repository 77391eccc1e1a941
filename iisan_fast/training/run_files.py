"""Read the run folder, which has everything to resume a run, to evaluate it, and to know how it was made.

config.json: the folder's format and the resolved settings. environment.json: the machine, the versions, and the
checkpoint with which the run began, if it began with one. views.json: how the hidden states were made. sequences.npz:
the result of the data protocol. items.npz: the item ids with their training counts and titles.
neighbours.safetensors: the neighbour terms, made from the two. checksums.json: those of the files before, and of
test.json. metrics.jsonl: one line for each epoch. best.safetensors: weights and item vectors of the best epoch.
last.safetensors: weights and optimizer state of the last epoch, or of a step within one. previous.safetensors: the
checkpoint before it, which stands in if it is damaged. test.json: the figures on the test set. catalogue.safetensors:
the items that were added, updated and removed since the training. lock: held by the process that trains or changes
the catalogue.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import FEATURES, SOURCES, RunConfig
from ..data import RunItems, Sequences, load_items, load_sequences
from ..errors import InputError
from ..files import refuse_irregular
from ..setting_fields import to_dict
from ..settings_files import RUN_FORMAT, read_run_config, read_run_settings, read_settings
from ..states import describes_view
from .checkpoints import RESTORE, load_checkpoint
from .run_environment import rounding_changes
from .run_record import RECORD_FILE, RunRecord

LOGGER = logging.getLogger(__name__)
CheckState = Callable[[dict[str, Any], Path], object]

FORMS_IN_FORMAT_1 = {"torch": "reference", "native": "cpu", "triton": "gpu"}  # their names in format 2
CHECKPOINTS = ("best.safetensors", "last.safetensors", "previous.safetensors")
CATALOGUE_FILE = "catalogue.safetensors"
RUN_FILES = (
    *("config.json", "environment.json", "views.json", "sequences.npz", "items.npz", "neighbours.safetensors"),
    RECORD_FILE,
    *("metrics.jsonl", *CHECKPOINTS, "test.json", CATALOGUE_FILE, "lock"),
)
HISTORIES_FILE = "sequences.npz"
ITEMS_FILE = "items.npz"
FIGURES = {"method": str, "best_epoch": int, "epochs": int, "test": dict, "popularity": dict}  # of test.json


class RunFiles:
    """The files of a run, to be read."""

    def __init__(self, path: Path | None) -> None:
        """Take the path of a run folder; None if it is not known yet. Nothing is read."""
        self._path = path
        self._last_is_damaged = False
        self._record: RunRecord | None = None

    @property
    def path(self) -> Path:
        """Return the folder's path. Raises ValueError if it is not known yet."""
        if self._path is None:
            raise ValueError("expected a folder with a path")
        return self._path

    @property
    def best(self) -> Path:
        """Return the file of the best epoch's checkpoint."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """Return the file of the last checkpoint."""
        return self.path / "last.safetensors"

    @property
    def previous(self) -> Path:
        """Return the file of the checkpoint before the last."""
        return self.path / "previous.safetensors"

    @property
    def neighbours(self) -> Path:
        """Return the file of the neighbour terms."""
        return self.path / "neighbours.safetensors"

    @property
    def metrics(self) -> Path:
        """Return the file of the epochs' figures."""
        return self.path / "metrics.jsonl"

    @property
    def catalogue(self) -> Path:
        """Return the file of the catalogue's changes since the training."""
        return self.path / CATALOGUE_FILE

    @property
    def test(self) -> Path:
        """Return the file of the figures on the test set."""
        return self.path / "test.json"

    def read_record(self) -> RunRecord | None:
        """Read the run's checksums, by which the other files are checked, and return them; None if there are none.

        Raises InputError if they are damaged.
        """
        self._record = RunRecord.read(self.path)
        return self._record

    def load_best(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the state of the best epoch's checkpoint. Raises InputError if it is damaged."""
        return load_checkpoint(self.best)

    @property
    def has_checkpoint(self) -> bool:
        """Return True if there is a checkpoint to resume from."""
        return self.last.exists() or self.previous.exists()

    def load_last(self, check: CheckState = lambda state, path: None) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        """Return the tensors, the state and the file of the last checkpoint, or with a warning of the previous one.

        The previous one stands in for a last one that is missing or damaged. check: called with the state and the
        path; raises InputError if the state is not a run's. Raises InputError if no checkpoint can be used.
        """
        try:
            return _load_checked(self.last, check)
        except InputError as error:
            if not self.previous.exists():
                raise
            self._last_is_damaged = self.last.exists()
            try:
                loaded = _load_checked(self.previous, check)
            except InputError as also:
                raise InputError(f"{error}; {also}") from None
            LOGGER.warning("%s; the run goes on from the checkpoint before it, %s", error, self.previous.name)
            return loaded

    @property
    def config(self) -> RunConfig:
        """Return the run's resolved configuration.

        Raises InputError if the file is missing or wrong, or if a setting has changed that the run's results depend on.
        """
        path = self.path / "config.json"
        config = read_run_config(path)
        if self._record is not None:
            self._record.refuse_changed_settings(config, path)
        return config

    def mention_changed_settings(self) -> None:
        """Log the settings that were changed in config.json and may be."""
        changes = [] if self._record is None else self._record.permitted_changes(self.config)
        if changes:
            LOGGER.warning("%s: changed since it was written: %s", self.path / "config.json", "; ".join(changes))

    @property
    def views(self) -> dict[str, Any]:
        """Return the description of each view of the run by name. Raises InputError if the file is missing or wrong."""
        self._refuse_damage("views.json", RESTORE)
        views = read_settings(self.path / "views.json")
        if not all(describes_view(view, (*SOURCES, FEATURES)) for view in views.values()):
            raise InputError(
                f"{self.path / 'views.json'}: expected descriptions of views, found something else; restore it"
            )
        return views

    @property
    def sequences(self) -> Sequences:
        """Return the histories that the run is trained on.

        Raises InputError if the file is missing or damaged, or if the run was published without it.
        """
        if self.is_published and not self.has_histories:
            raise InputError(f"{self.path}: was published without the histories that this needs; use the run itself")
        self._refuse_damage("sequences.npz", RESTORE)
        return load_sequences(self.path / "sequences.npz")

    @property
    def is_published(self) -> bool:
        """Return True for a published folder, which holds the part of a run that ranks."""
        return self._record is not None and self._record.published

    @property
    def has_histories(self) -> bool:
        """Return True if the run has its histories; a published one may have none."""
        return (self.path / "sequences.npz").exists()

    @property
    def items(self) -> RunItems:
        """Return the items that the run is trained on; those of an earlier version's run have no titles.

        Raises InputError if the file is missing or damaged.
        """
        self._refuse_damage(ITEMS_FILE, RESTORE)
        if self.has_histories and not (self.path / ITEMS_FILE).exists() and not self.is_recorded(ITEMS_FILE):
            sequences = self.sequences
            return RunItems(sequences.item_ids, sequences.training_counts, None)
        return load_items(self.path / ITEMS_FILE)

    @property
    def environment(self) -> dict[str, Any]:
        """Return the machine and the versions with which the run began; empty if they were not recorded.

        Raises InputError if the file is damaged.
        """
        path = self.path / "environment.json"
        self._refuse_damage(path.name, "restore the file from a copy, or remove it to go on without it")
        recorded = read_settings(path) if path.exists() else {}
        _, number = read_run_settings(self.path / "config.json")
        form = str(recorded.get("kernels"))
        if number == 1 and form in FORMS_IN_FORMAT_1:
            recorded["kernels"] = FORMS_IN_FORMAT_1[form]
        return recorded

    def other_rounding(self, device: torch.device, ranks: int) -> list[str]:
        """Return a phrase for each change since the run began that makes results differ in rounding.

        ranks: their number now.
        """
        return rounding_changes(self.environment, device, ranks)

    def read_test(self) -> dict[str, Any] | None:
        """Return the figures on the test set; None if there are none, and with a warning if the file is damaged."""
        if not self.test.exists():
            return None
        try:
            return self.figures
        except InputError as error:
            LOGGER.warning("%s; the best checkpoint is tested again", error)
            return None

    @property
    def figures(self) -> dict[str, Any]:
        """Return the figures on the test set. Raises InputError if the file is missing or damaged."""
        self._refuse_damage(self.test.name, RESTORE)
        figures = read_settings(self.test)
        for name, kind in FIGURES.items():
            if type(figures.get(name)) is not kind:
                raise InputError(
                    f"{self.test}: {name}: expected {kind.__name__}, found {figures.get(name)!r}; {RESTORE}"
                )
        return figures

    def is_recorded(self, name: str) -> bool:
        """Return True if the run has written the file of this name, and its checksum."""
        return self._record is not None and name in self._record.files

    def check_neighbours(self, remedy: str) -> Path:
        """Return the path of neighbours.safetensors.

        Raises InputError, with the remedy, if the file is missing or its checksum does not fit.
        """
        self._refuse_damage(self.neighbours.name, remedy)
        if not self.neighbours.exists():
            raise InputError(f"{self.neighbours}: no such file; {remedy}")
        refuse_irregular(self.neighbours)
        return self.neighbours

    def _refuse_damage(self, name: str, remedy: str) -> None:
        """Raise InputError, with the remedy, if a file's checksum was recorded and does not fit."""
        if self._record is not None:
            self._record.refuse_changed_file(self.path / name, remedy)


def _load_checked(path: Path, check: CheckState) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Return the tensors, the state and the path of a checkpoint, after the check.

    Raises InputError if it cannot be used.
    """
    tensors, state = load_checkpoint(path)
    check(state, path)
    return tensors, state, path


def settings_file(config: RunConfig) -> bytes:
    """Return the content of config.json, with the folder's format."""
    return json_file({"format": RUN_FORMAT, **to_dict(config)})


def json_file(value: Any) -> bytes:
    """Return a JSON value as the content of a file."""
    return (json.dumps(value, indent=2) + "\n").encode()
