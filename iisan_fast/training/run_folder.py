"""Write and read the run folder, which has everything to resume a run, to evaluate it, and to know how it was made.

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
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import FEATURES, SOURCES, RunConfig
from ..data import Dataset, RunItems, Sequences, load_items, load_sequences
from ..errors import InputError
from ..files import (
    keep_under,
    locked,
    refuse_irregular,
    refuse_unwritable,
    remove_leftovers,
    whole_file,
    write_atomically,
)
from ..setting_fields import to_dict
from ..settings_files import RUN_FORMAT, read_run_config, read_run_settings, read_settings
from ..states import describes_view
from .checkpoints import RESTORE, load_checkpoint, save_checkpoint, write_tensors
from .numbered_folders import free_folder, make_free_folder
from .run_environment import environment, rounding_changes
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
LOCK_FILE = "lock"
NOTHING_MORE: Mapping[str, Any] = {}
HISTORIES_FILE = "sequences.npz"
ITEMS_FILE = "items.npz"
FIGURES = {"method": str, "best_epoch": int, "epochs": int, "test": dict, "popularity": dict}  # of test.json


class RunFolder:
    """A run's folder: its files are read by anyone, and written by the one process that holds its lock."""

    def __init__(self, path: Path | None, name: str = "") -> None:
        """Take the path of a run folder. Nothing is read or written.

        path: None for the first free folder runs/NAME-N.
        """
        self._path = path
        self._name = name
        self._lock = ExitStack()
        self._held = False
        self._last_is_damaged = False
        self._record: RunRecord | None = None

    @classmethod
    def numbered(cls, name: str) -> RunFolder:
        """Return the first free folder runs/NAME-N, counted from 1, for a new run. Nothing is written.

        Its path is settled when it is claimed.
        """
        return cls(None, name)

    @property
    def path(self) -> Path:
        """Return the folder's path; that of a numbered one may change until it is claimed."""
        return free_folder(self._name) if self._path is None else self._path

    @classmethod
    def open(cls, path: Path, writable: bool = False) -> RunFolder:
        """Return the folder of an existing run. A run without checksums gets a warning.

        A run of format 1 is converted each time it is read; its files do not change. writable: hold the folder as its
        only writer until `close`. Raises InputError if the folder holds no run, one of an unknown format, or if another
        process writes into it.
        """
        if not (path / "config.json").exists():
            raise InputError(f"{path}: not a run folder (no config.json)")
        read_run_settings(path / "config.json")
        folder = cls(path)
        if folder.read_record() is None:
            LOGGER.warning(
                "%s: has no checksums, so damage may stay unseen; `iisan-fast verify %s` adds them", path, path
            )
        if writable:
            folder.hold()
        return folder

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

    def __enter__(self) -> RunFolder:
        """Return the folder, which is closed at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the folder back to other writers."""
        self.close()

    def close(self) -> None:
        """Give the folder back to other writers. A folder that is not held stays as it is."""
        self._lock.close()
        self._held = False

    def hold(self) -> RunFolder:
        """Hold the folder as its only writer until `close`, and return it.

        Raises InputError if another process holds it, or if it cannot be written.
        """
        if not self._held:
            busy = (
                f"{self.path}: another process trains in this folder, or changes its catalogue; wait for it to end, "
                "or choose another folder"
            )
            refuse_unwritable(self.path)
            self._lock.enter_context(locked(self.path / LOCK_FILE, busy))
            self._held = True
            self.read_record()  # another process may have written it meanwhile
        return self

    def read_record(self) -> RunRecord | None:
        """Read the run's checksums, by which the other files are checked, and return them; None if there are none.

        Raises InputError if they are damaged.
        """
        self._record = RunRecord.read(self.path)
        return self._record

    def claim(self) -> None:
        """Make the folder of a new run, and hold it as its only writer until `close`.

        Nothing is done if it is held already. A numbered folder that another process has made meanwhile is left to it,
        and the next number is taken. Raises InputError if the folder holds a run, or if another process writes into it;
        nothing is changed then.
        """
        if self._held:
            return
        self.refuse_if_used()
        if self._path is None:
            self._path = make_free_folder(self._name)
        self._path.mkdir(parents=True, exist_ok=True)
        self.hold()
        self.refuse_if_used()  # by a run that began and ended meanwhile

    def begin(
        self,
        config: RunConfig,
        views: Mapping[str, Any],
        dataset: Dataset,
        neighbours: bytes,
        device: torch.device,
        began_with: Mapping[str, Any] = NOTHING_MORE,
    ) -> None:
        """Claim the folder and write the first files of a new run. Raises InputError as `claim` does.

        dataset: of the run, with its titles. neighbours: the content of neighbours.safetensors. began_with: more that
        environment.json holds.
        """
        self.claim()
        record = RunRecord().with_settings(config)
        sequences = dataset.sequences
        items = RunItems(sequences.item_ids, sequences.training_counts, dataset.titles)
        for name, save in (("sequences.npz", sequences.save), (ITEMS_FILE, items.save)):
            with whole_file(self.path / name) as temporary:
                save(temporary)
                record = record.with_file(name, temporary.read_bytes())
        circumstances = {**environment(device), **began_with}
        contents = {"views.json": json_file(views), "environment.json": json_file(circumstances)}
        for name, content in {**contents, self.neighbours.name: neighbours}.items():
            write_atomically(self.path / name, content)
            record = record.with_file(name, content)
        self._write_record(record)
        self._write_settings(config)  # written last, because config.json makes the folder a run

    def refuse_if_used(self) -> None:
        """Raise InputError if the folder holds a run or a part of one, if it is a file, or if it cannot be written."""
        if (self.path / "config.json").exists():
            raise InputError(f"{self.path}: already holds a run; resume it, or choose another folder for the run")
        for path in (
            self.best,
            self.last,
            self.previous,
            self.metrics,
            self.test,
            self.catalogue,
        ):  # a resume would take them as its own
            if path.exists():
                raise InputError(
                    f"{self.path}: holds {path.name} of another run; choose another folder for the run, or remove it"
                )
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise InputError(f"{self.path}: expected a folder for the run, found a file or a link that leads to none")
        refuse_unwritable(self.path)

    def save_best(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of the best epoch. Raises OSError if it cannot be written; the old one is kept then."""
        save_checkpoint(self.best, tensors, state)

    def load_best(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the state of the best epoch's checkpoint. Raises InputError if it is damaged."""
        return load_checkpoint(self.best)

    def save_last(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write the last checkpoint, and keep the one before it as the previous one.

        At every moment one of the two is a whole checkpoint. Raises OSError if it cannot be written; both are kept
        then.
        """
        with whole_file(self.last) as temporary:
            write_tensors(temporary, tensors, state, self.last)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if self.last.exists() and not self._last_is_damaged:
                keep_under(self.last, self.previous)
        self._last_is_damaged = False

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

    def other_rounding(self, device: torch.device) -> list[str]:
        """Return a phrase for each change since the run began that makes results differ in rounding."""
        return rounding_changes(self.environment, device)

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

    def write_neighbours(self, content: bytes) -> None:
        """Write neighbours.safetensors again, as `begin` does."""
        self._write_recorded(self.neighbours.name, content)

    def _refuse_damage(self, name: str, remedy: str) -> None:
        """Raise InputError, with the remedy, if a file's checksum was recorded and does not fit."""
        if self._record is not None:
            self._record.refuse_changed_file(self.path / name, remedy)

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed write has left; the complete files stay."""
        for name in RUN_FILES:
            remove_leftovers(self.path / name)

    def change_config(self, config: RunConfig) -> None:
        """Write the changed settings of an existing run. A run of format 1 becomes one of the current format."""
        if environment := self.environment:
            self._write_json("environment.json", environment)
        if self._record is not None:
            self._write_record(self._record.without_settings())
        self._write_settings(config)
        if self._record is not None:
            self._write_record(self._record.with_settings(config))

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl again: one JSON object in a line for each epoch."""
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_test(self, result: dict[str, Any]) -> None:
        """Write test.json with the figures on the test set."""
        self._write_json(self.test.name, result)

    def _write_json(self, name: str, value: Any) -> None:
        """Write a JSON value as a whole or not at all, and its checksum."""
        self._write_recorded(name, json_file(value))

    def _write_recorded(self, name: str, content: bytes) -> None:
        """Write a file as a whole or not at all, and its checksum.

        The file has no checksum while it is replaced, so that a kill leaves none that does not fit.
        """
        if self._record is not None:
            self._write_record(self._record.without_file(name))
        write_atomically(self.path / name, content)
        if self._record is not None:
            self._write_record(self._record.with_file(name, content))

    def _write_settings(self, config: RunConfig) -> None:
        """Write config.json, with the folder's format."""
        write_atomically(self.path / "config.json", settings_file(config))

    def _write_record(self, record: RunRecord) -> None:
        """Write checksums.json, unless it has this content. Raises OSError if it cannot be written."""
        if record != self._record:
            record.write(self.path)
            self._record = record


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
