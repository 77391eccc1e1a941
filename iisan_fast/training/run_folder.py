"""Write and read the run folder, which has everything to resume a run, to evaluate it, and to know how it was made.

config.json: the folder's format and the resolved settings. environment.json: the machine and the versions. views.json:
how the hidden states were made. sequences.npz: the result of the data protocol. metrics.jsonl: one line for each epoch.
best.safetensors: weights and item vectors of the best epoch. last.safetensors: weights and optimizer state of the last
epoch. test.json: the figures on the test set.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, kernels
from ..config import RunConfig
from ..data import Sequences, load_sequences
from ..errors import InputError
from ..files import refuse_unwritable, write_atomically
from ..setting_fields import to_dict
from ..settings_files import RUN_FORMAT, read_run_config, read_run_settings, read_settings
from ..states import describes_view

RUN_LIBRARIES = ("transformers", "lmdb", "numpy", "safetensors")
DECIDES_ROUNDING = ("torch", "device", "kernels")  # the entries of an environment that change the rounding of results
FORMS_IN_FORMAT_1 = {"torch": "reference", "native": "cpu", "triton": "gpu"}  # their names in format 2
ON_A_CPU = ("threads", "processor", "compiler")  # such entries for a CPU
RUN_FILES = (
    *("config.json", "environment.json", "views.json", "sequences.npz", "metrics.jsonl"),
    *("best.safetensors", "last.safetensors", "test.json"),
)
HALF_WRITTEN = re.compile(rf"\.(?:{'|'.join(map(re.escape, RUN_FILES))})\.[a-z0-9_]{{8}}")  # temporary files' names


class RunFolder:
    """The paths of a run's files, and the reading and writing of those that are not checkpoints."""

    def __init__(self, path: Path) -> None:
        """Take the path of a run folder. Nothing is read or written."""
        self.path = path
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.test = path / "test.json"

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, views: Mapping[str, Any], sequences: Sequences, device: torch.device
    ) -> RunFolder:
        """Write the first files of a new run into a folder, and return it.

        Raises InputError if the folder holds a run already.
        """
        folder = cls(path)
        folder.refuse_if_used()
        path.mkdir(parents=True, exist_ok=True)
        sequences.save(path / "sequences.npz")
        _write_json(path / "views.json", views)
        _write_json(path / "environment.json", environment(device))
        folder.write_config(config)  # written last, because config.json makes the folder a run
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the folder of an existing run.

        A run of format 1 is converted each time it is read; its files do not change. Raises InputError if the folder
        holds no run, or one of an unknown format.
        """
        if not (path / "config.json").exists():
            raise InputError(f"{path}: not a run folder (no config.json)")
        read_run_settings(path / "config.json")
        return cls(path)

    def refuse_if_used(self) -> None:
        """Raise InputError if the folder holds a run already, if the path is a file, or if it cannot be written."""
        if (self.path / "config.json").exists():
            raise InputError(f"{self.path}: already holds a run; resume it, or choose another folder for the run")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: expected a folder for the run, found a file")
        refuse_unwritable(self.path)

    @property
    def config(self) -> RunConfig:
        """Return the run's resolved configuration. Raises InputError if the file is missing or wrong."""
        return read_run_config(self.path / "config.json")

    @property
    def views(self) -> dict[str, Any]:
        """Return the description of each view of the run by name. Raises InputError if the file is missing or wrong."""
        views = read_settings(self.path / "views.json")
        if not all(map(describes_view, views.values())):
            raise InputError(
                f"{self.path / 'views.json'}: expected descriptions of views, found something else; restore it"
            )
        return views

    @property
    def sequences(self) -> Sequences:
        """Return the histories that the run is trained on."""
        return load_sequences(self.path / "sequences.npz")

    @property
    def environment(self) -> dict[str, Any]:
        """Return the machine and the versions with which the run began; empty if they were not recorded."""
        path = self.path / "environment.json"
        recorded = read_settings(path) if path.exists() else {}
        _, number = read_run_settings(self.path / "config.json")
        form = str(recorded.get("kernels"))
        if number == 1 and form in FORMS_IN_FORMAT_1:
            recorded["kernels"] = FORMS_IN_FORMAT_1[form]
        return recorded

    def other_rounding(self, device: torch.device) -> list[str]:
        """Return a phrase for each change since the run began that makes results differ in rounding."""
        recorded = self.environment
        current = environment(device)
        names = DECIDES_ROUNDING + (ON_A_CPU if device.type == "cpu" else ())
        return [
            f"{name} {recorded[name]} then, {current[name]} now"
            for name in names
            if name in recorded and recorded[name] != current[name]
        ]

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed write has left; the complete files stay."""
        for path in self.path.iterdir():
            if HALF_WRITTEN.fullmatch(path.name) and path.is_file():
                path.unlink()

    def write_config(self, config: RunConfig) -> None:
        """Write config.json, with the folder's format."""
        _write_json(self.path / "config.json", {"format": RUN_FORMAT, **to_dict(config)})

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl again: one JSON object in a line for each epoch."""
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_test(self, result: dict[str, Any]) -> None:
        """Write test.json with the figures on the test set."""
        _write_json(self.test, result)


def environment(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions and the form of the ops that results depend on, as JSON values."""
    on_gpu = device.type == "cuda"
    form = kernels.form_on(device)
    return {
        "iisan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build's tag
        **{name: metadata.version(name) for name in RUN_LIBRARIES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),  # the widest instructions that torch uses on it
        "processor_name": _processor_name(),
        "kernels": form,
        "compiler": kernels.compiler_version() if form == "cpu" else None,
    }


def _processor_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.exists() else None
    return name[1] if name else platform.processor()


def _write_json(path: Path, value: Any) -> None:
    """Write a JSON value as a whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
