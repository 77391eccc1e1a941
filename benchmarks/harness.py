"""Describe a benchmark, run it, and record its result: the same way for all benchmarks.

A result is a JSON object. It begins with the command that gives the same figures again, the dataset's name, the commit,
the machine and its versions, and the settings; the figures that the benchmark measured follow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_atomically
from ..ranks import ALONE, Ranks
from ..setting_fields import settings_of
from .tables import ResultTable

if TYPE_CHECKING:
    import torch

    from ..data import Sequences

REQUIRED, OPTIONAL, NONE = "required", "optional", "none"  # whether a benchmark takes a dataset
DEMO, SYNTHETIC = "demo", "synthetic"  # names of datasets that are not folders
VIEW_DEFAULTS = {"max_tokens": 30, "encoder_dtype": "auto", "trust_remote_code": False, "revision": None}

Result = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The option of a benchmark for the folder that it writes into."""

    name: str
    help: str
    required: bool = False  # the folder then also takes the result, as result.json


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its settings, the function that measures, and how its result is shown.

    The function takes a Setup and the settings and returns the figures. If its figures hold `settings`, they replace
    the given ones in the result: what the machine or the dataset decided is then recorded, not the default.
    """

    name: str
    function: str  # "module:function" of this package; it is imported when the benchmark runs
    settings: type[Any]  # a frozen dataclass; each field made by `setting` becomes an option
    tables: Callable[[Result], Iterable[ResultTable | str]]  # tables and lines of text, in order
    summary: str  # one line
    details: str
    examples: tuple[str, ...]
    dataset: str = OPTIONAL
    argument: str = "DATASET"  # as help names it: the dataset, or RUN for the folder of a trained run
    on_ranks: bool = False  # True: a launcher of several processes may start it
    on_device: bool = True  # False: nothing is run on a device, and there is no option for one
    takes_encoders: bool = False  # sets of views become the setting `encoders`
    folder: Folder | None = None
    drawing: str = ""  # "module:function" that draws a result into a PNG file
    option_names: Mapping[str, str] = field(default_factory=dict)  # by setting, where they differ


@dataclass(frozen=True)
class Setup:
    """The dataset, the device and the folder that a benchmark runs on."""

    dataset: Path | None  # None: the embedded demo
    device: torch.device
    folder: Path | None = None
    ranks: Ranks = ALONE  # among which a benchmark places its runs

    @property
    def name(self) -> str:
        """Return the dataset's name."""
        return DEMO if self.dataset is None else self.dataset.resolve().name

    @cached_property
    def sequences(self) -> Sequences:
        """Load the histories. Raises InputError if the dataset cannot be read."""
        from .machine import named_sequences  # imports torch

        return named_sequences(self.dataset)[1]


def run_benchmark(benchmark: Benchmark, settings: Any, setup: Setup) -> Result:
    """Run a benchmark and return its result, on all ranks.

    Raises InputError for bad settings, where forms disagree, and on several ranks for a benchmark of one process.
    """
    from .machine import commit, package_versions, versions  # imports torch

    if setup.ranks.several and not benchmark.on_ranks:
        raise InputError(
            f"bench {benchmark.name}: runs in one process, found {setup.ranks.count} ranks; run it without the launcher"
        )
    started_at = commit()  # of the code as it starts: a benchmark may take hours
    figures = imported(benchmark.function)(setup, settings)
    recorded = figures.pop("settings", None) or asdict(settings)
    machine = {"environment": versions(setup.device)} if benchmark.on_device else {"versions": package_versions()}
    result = {
        "command": command_line(benchmark, setup.dataset, recorded),
        "dataset": SYNTHETIC if benchmark.dataset == NONE else setup.name,
        "commit": started_at,
        **machine,
        "settings": recorded,
        **figures,
    }
    if benchmark.folder is not None and benchmark.folder.required and setup.folder is not None and setup.ranks.is_first:
        write_result(setup.folder / "result.json", result)
    return result


def imported(path: str) -> Callable[..., Any]:
    """Import a function that "module:function" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def write_result(file: Path, result: Result) -> None:
    """Write a result as a JSON file, whole or not at all."""
    write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())


def script_parser(command: str, document: str) -> argparse.ArgumentParser:
    """Return the parser of a script here: its command, its module's first line, and --out for its result."""
    parser = argparse.ArgumentParser(command, description=document.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function. An InputError becomes one line on standard error and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def folder_argument(text: str) -> Path:
    """Return the folder that an argument of a script names. Raises ArgumentTypeError if there is none."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def command_line(benchmark: Benchmark, dataset: Path | None, settings: Mapping[str, Any]) -> str:
    """Return the command that gives a result again; the folders of the dataset and of the runs are left out."""
    words = ["iisan-fast", "bench", benchmark.name]
    words += [benchmark.argument] * (dataset is not None)
    if benchmark.folder is not None and benchmark.folder.required:
        words.append(f"--{benchmark.folder.name}=FOLDER")
    for name in settings_of(benchmark.settings):
        words += _option_words(benchmark.option_names.get(name, name).replace("_", "-"), settings[name])
    if benchmark.takes_encoders:
        for name, views in settings["encoders"].items():
            words.append(f"--pair={name}: {'; '.join(map(view_text, views))}")
    return shlex.join(words)


def view_text(view: Mapping[str, Any]) -> str:
    """Return a view's settings as --view and --pair take them, those of no effect left out."""
    parts = {name: value for name, value in view.items() if value not in (None, {})}
    options = parts.pop("options", {})
    parts |= {f"option.{name}": json.dumps(value) for name, value in options.items()}
    if "layers" in parts:
        parts["layers"] = ",".join(map(str, parts["layers"]))
    words = [f"{name}={value}" for name, value in parts.items() if VIEW_DEFAULTS.get(name) != value]
    return shlex.join(words)


def _option_words(option: str, value: Any) -> list[str]:
    """Return a setting as words of a command line: a flag, one option, or an option for each part of a list."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}={part}" for part in (value if isinstance(value, (tuple, list)) else [value])]
