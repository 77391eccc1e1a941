"""The run folder: all that is needed to resume a run, evaluate it, and know how it was made.

config.json (the folder's format, and the resolved settings), environment.json, views.json (how the hidden states were
made), sequences.npz (the data protocol's result), metrics.jsonl (one line an epoch), best.safetensors (weights and item
vectors), last.safetensors (weights and optimizer), test.json.
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
from ..files import write_atomically
from ..setting_fields import to_dict
from ..settings_files import RUN_FORMAT, read_run_config, read_run_settings, read_settings
from ..states import describes_view

RUN_LIBRARIES = ("transformers", "lmdb", "numpy", "safetensors")
DECIDES_ROUNDING = ("torch", "device", "kernels")  # of an environment
FORMS_IN_FORMAT_1 = {"torch": "reference", "native": "cpu", "triton": "gpu"}  # names today
ON_A_CPU = ("threads", "processor", "compiler")  # likewise
RUN_FILES = (
    *("config.json", "environment.json", "views.json", "sequences.npz", "metrics.jsonl"),
    *("best.safetensors", "last.safetensors", "test.json"),
)
HALF_WRITTEN = re.compile(rf"\.(?:{'|'.join(map(re.escape, RUN_FILES))})\.[a-z0-9_]{{8}}")  # as `whole_file` names them


class RunFolder:
    """The paths of a run, and the files that are not checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.test = path / "test.json"

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, views: Mapping[str, Any], sequences: Sequences, device: torch.device
    ) -> RunFolder:
        """Start a run in a folder that holds none yet."""
        folder = cls(path)
        folder.refuse_if_used()
        path.mkdir(parents=True, exist_ok=True)
        sequences.save(path / "sequences.npz")
        _write_json(path / "views.json", views)
        _write_json(path / "environment.json", environment(device))
        folder.write_config(config)  # last: its presence makes the folder a run
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run's folder.

        A run of format 1 is migrated whenever it is read, and stays on disk as it is. Raises InputError for a folder
        that holds no run, or one of a format that this version does not know.
        """
        if not (path / "config.json").exists():
            raise InputError(f"{path}: not a run folder (no config.json)")
        read_run_settings(path / "config.json")
        return cls(path)

    def refuse_if_used(self) -> None:
        """Raise InputError where the folder holds a run already, or is a file."""
        if (self.path / "config.json").exists():
            raise InputError(f"{self.path}: already holds a run; resume it, or choose another folder for the run")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: expected a folder for the run, found a file")

    @property
    def config(self) -> RunConfig:
        """The run's resolved configuration."""
        return read_run_config(self.path / "config.json")

    @property
    def views(self) -> dict[str, Any]:
        """The description of each of the run's views, as the store's manifest held it."""
        views = read_settings(self.path / "views.json")
        if not all(map(describes_view, views.values())):
            raise InputError(
                f"{self.path / 'views.json'}: expected descriptions of views, found something else; restore it"
            )
        return views

    @property
    def sequences(self) -> Sequences:
        """The histories that the run was trained on."""
        return load_sequences(self.path / "sequences.npz")

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and the versions that the run began with; empty where they were not recorded."""
        path = self.path / "environment.json"
        recorded = read_settings(path) if path.exists() else {}
        _, number = read_run_settings(self.path / "config.json")
        form = str(recorded.get("kernels"))
        if number == 1 and form in FORMS_IN_FORMAT_1:
            recorded["kernels"] = FORMS_IN_FORMAT_1[form]
        return recorded

    def other_rounding(self, device: torch.device) -> list[str]:
        """Return the differences from the environment that the run began in, which make results differ in rounding."""
        began, now = self.environment, environment(device)
        names = DECIDES_ROUNDING + (ON_A_CPU if device.type == "cpu" else ())
        return [
            f"{name} {began[name]} then, {now[name]} now"
            for name in names
            if name in began and began[name] != now[name]
        ]

    def remove_leftovers(self) -> None:
        """Remove the half-written files that a kill in the middle of a write left; the old files stand."""
        for path in self.path.iterdir():
            if HALF_WRITTEN.fullmatch(path.name) and path.is_file():
                path.unlink()

    def write_config(self, config: RunConfig) -> None:
        """Write config.json."""
        _write_json(self.path / "config.json", {"format": RUN_FORMAT, **to_dict(config)})

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl: one JSON object a line, one line an epoch."""
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_test(self, result: dict[str, Any]) -> None:
        """Write the test set's figures."""
        _write_json(self.test, result)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions that a result is made with."""
    on_gpu, form = device.type == "cuda", kernels.form_on(device)
    return {
        "iisan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # the build's tag included
        **{name: metadata.version(name) for name in RUN_LIBRARIES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),  # its widest instructions that torch uses
        "processor_name": _processor_name(),
        "kernels": form,
        "compiler": kernels.compiler_version() if form == "cpu" else None,
    }


def _processor_name() -> str:
    """Return the processor's name as the system says it."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.exists() else None
    return name[1] if name else platform.processor()


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
