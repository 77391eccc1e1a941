"""Write the run folder: claim it for one process, and write each of its files as a whole or not at all.

On several ranks, all call the methods that write, and rank 0 alone writes, while the others wait.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from ..config import RunConfig
from ..data import Dataset, RunItems
from ..errors import InputError
from ..files import (
    keep_under,
    locked,
    refuse_unwritable,
    remove_leftovers,
    whole_file,
    write_atomically,
)
from ..ranks import ALONE, Ranks, refuse_unshared
from ..settings_files import read_run_settings
from .checkpoints import save_checkpoint, write_tensors
from .numbered_folders import free_folder, make_free_folder
from .run_environment import environment
from .run_files import ITEMS_FILE, RUN_FILES, RunFiles, json_file, settings_file
from .run_record import RunRecord

LOGGER = logging.getLogger(__name__)
LOCK_FILE = "lock"
NOTHING_MORE: Mapping[str, Any] = {}
Arguments = ParamSpec("Arguments")


def _by_rank_0(
    write: Callable[Concatenate[RunFolder, Arguments], None],
) -> Callable[Concatenate[RunFolder, Arguments], None]:
    """Let rank 0 alone call a method that writes, while the other ranks wait; its errors are raised on all ranks."""

    @functools.wraps(write)
    def on_all_ranks(self: RunFolder, *arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        self._ranks.first_does(lambda: write(self, *arguments, **named))
        if not self._ranks.is_first:
            self.read_record()  # which rank 0 may have written

    return on_all_ranks


class RunFolder(RunFiles):
    """A run's folder: its files are read by anyone, and written by the one process that holds its lock."""

    def __init__(self, path: Path | None, name: str = "", ranks: Ranks = ALONE) -> None:
        """Take the path of a run folder. Nothing is read or written.

        path: None for the first free folder runs/NAME-N. ranks: those that train the run.
        """
        super().__init__(path)
        self._name = name
        self._ranks = ranks
        self._lock = ExitStack()
        self._held = False

    @property
    def path(self) -> Path:
        """Return the folder's path; that of a numbered one may change until it is claimed."""
        return free_folder(self._name) if self._path is None else self._path

    @classmethod
    def open(cls, path: Path, writable: bool = False, ranks: Ranks = ALONE) -> RunFolder:
        """Return the folder of an existing run. A run without checksums gets a warning.

        A run of format 1 is converted each time it is read; its files do not change. writable: hold the folder as its
        only writer until `close`. ranks: those that train the run. Raises InputError if the folder holds no run, one of
        an unknown format, or if another process writes into it.
        """
        if not (path / "config.json").exists():
            raise InputError(f"{path}: not a run folder (no config.json)")
        read_run_settings(path / "config.json")
        folder = cls(path, ranks=ranks)
        if folder.read_record() is None:
            LOGGER.warning(
                "%s: has no checksums, so damage may stay unseen; `iisan-fast verify %s` adds them", path, path
            )
        if writable:
            folder.hold()
        return folder

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

        Raises InputError if another process holds it, if it cannot be written, or if a rank does not see it.
        """
        if not self._held:
            self._ranks.first_does(self._take_lock)
            self._held = True
            refuse_unshared(self._ranks, self.path)
            self.read_record()  # another process may have written it meanwhile
        return self

    def claim(self) -> None:
        """Make the folder of a new run, and hold it as its only writer until `close`.

        Nothing is done if it is held already. A numbered folder that another process has made meanwhile is left to it,
        and the next number is taken. Raises InputError if the folder holds a run, or if another process writes into it;
        nothing is changed then. Raises InputError if a rank does not see the folder.
        """
        if not self._held:
            self._path = self._ranks.first_does(self._claimed)
            self._held = True
            refuse_unshared(self._ranks, self.path)

    def _claimed(self) -> Path:
        """Make the folder of a new run, take its lock, and return its path. Raises InputError as `claim` does."""
        self.refuse_if_used()
        if self._path is None:
            self._path = make_free_folder(self._name)
        self._path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.refuse_if_used()  # by a run that began and ended meanwhile
        return self._path

    def _take_lock(self) -> None:
        """Take the lock of the folder's writer. Raises InputError if another process has it."""
        busy = (
            f"{self.path}: another process trains in this folder, or changes its catalogue; wait for it to end, "
            "or choose another folder"
        )
        refuse_unwritable(self.path)
        self._lock.enter_context(locked(self.path / LOCK_FILE, busy))

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
        circumstances = {**environment(device, self._ranks.count), **began_with}
        self._write_first_files(config, views, dataset, neighbours, circumstances)

    @_by_rank_0
    def _write_first_files(
        self,
        config: RunConfig,
        views: Mapping[str, Any],
        dataset: Dataset,
        neighbours: bytes,
        circumstances: Mapping[str, Any],
    ) -> None:
        """Write the files of `begin`. circumstances: the content of environment.json."""
        record = RunRecord().with_settings(config)
        sequences = dataset.sequences
        items = RunItems(sequences.item_ids, sequences.training_counts, dataset.titles)
        for name, save in (("sequences.npz", sequences.save), (ITEMS_FILE, items.save)):
            with whole_file(self.path / name) as temporary:
                save(temporary)
                record = record.with_file_at(temporary)
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

    @_by_rank_0
    def save_best(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of the best epoch. Raises OSError if it cannot be written; the old one is kept then."""
        save_checkpoint(self.best, tensors, state)

    @_by_rank_0
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

    @_by_rank_0
    def write_neighbours(self, content: bytes | None) -> None:
        """Write neighbours.safetensors again, as `begin` does. content: None, on rank 0, changes nothing."""
        if content is not None:
            self._write_recorded(self.neighbours.name, content)

    @_by_rank_0
    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed write has left; the complete files stay."""
        for name in RUN_FILES:
            remove_leftovers(self.path / name)

    @_by_rank_0
    def change_config(self, config: RunConfig) -> None:
        """Write the changed settings of an existing run. A run of format 1 becomes one of the current format."""
        if environment := self.environment:
            self._write_json("environment.json", environment)
        if self._record is not None:
            self._write_record(self._record.without_settings())
        self._write_settings(config)
        if self._record is not None:
            self._write_record(self._record.with_settings(config))

    @_by_rank_0
    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl again: one JSON object in a line for each epoch."""
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @_by_rank_0
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
