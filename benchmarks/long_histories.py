"""The time and private memory of `stats` and of training on a dataset of up to a hundred million interactions.

The commands are those of a user, each in a new process. Training is by the method id, which needs no hidden states, and
is stopped by a signal at its first checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import CACHE_VARIABLE
from ..errors import InputError
from ..progress import progress_bar
from ..training import RunFolder
from .harness import Setup
from .made_histories import write_histories
from .private_memory import PrivateMemory
from .settings import HistoriesSettings
from .tables import NOT_MEASURED

LONGEST = 1800  # seconds of a command
LOOK_EVERY = 0.05  # seconds between two looks for a checkpoint
STOPPED = 128 + signal.SIGTERM  # the exit code of a training that a signal has stopped
NOTES = {
    "stats, first": "`stats` parses the dataset and writes its arrays into the cache, if users.tsv has 16 MB or more",
    "stats, again": "`stats` maps the arrays of the cache, after the files' digests and the checksums",
    "train": "`train --method id` from its start over the given steps to the checkpoint after them, with the neighbour "
    "terms, the run's copy of all histories and a permutation of all users; it maps the arrays of the cache",
    "seconds": "of the whole command. start_seconds: of what comes before the first step, and the checkpoint's writing",
    "private": "the largest sum of RssAnon and RssShmem in /proc/PID/status, looked at every 0.02 s by another "
    "process, of heaps, stacks and anonymous maps, Python and PyTorch included; pages of mapped files are not",
    "files": "likewise the largest RssFile: resident pages of files, which the system takes back if it needs memory",
}


def measure_histories(setup: Setup, settings: HistoriesSettings) -> dict[str, Any]:
    """Write the dataset, and run `stats` twice and `train` once. Raises InputError if a command fails."""
    with made_folder(setup.folder) as folder:
        dataset = folder / "dataset"
        if not dataset.exists():
            with progress_bar("histories", settings.interactions, "interactions") as written:
                write_histories(dataset, settings.interactions, settings.items, written)
        for name in ("parsed", "run"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with progress_bar("commands", 3, "commands") as advance:
            first, counts = stats_figures(folder, dataset)
            advance(1, "stats, first")
            again, mapped_counts = stats_figures(folder, dataset)
            if mapped_counts != counts:
                raise InputError(f"stats: expected equal counts of both, found {counts} and {mapped_counts}")
            advance(1, "stats, again")
            trained = training_figures(folder, dataset, settings)
            advance(1, "train")
        sizes = {
            "users_tsv_bytes": (dataset / "users.tsv").stat().st_size,
            "parsed_bytes": sum(path.stat().st_size for path in (folder / "parsed").rglob("*.bin")),
            "sequences_npz_bytes": (folder / "run" / "sequences.npz").stat().st_size,
        }
    rows = [{"what": "stats, first", **first}, {"what": "stats, again", **again}, {"what": "train", **trained}]
    return {"notes": NOTES, "counts": counts, **sizes, "rows": rows}


@contextmanager
def made_folder(kept: Path | None) -> Iterator[Path]:
    """Yield the folder of the dataset: one that is kept, or one that is removed at the end."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="iisan-fast-histories-") as folder:
        yield Path(folder)


def stats_figures(folder: Path, dataset: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run `stats`, and return the figures of the command and its counts. Raises InputError if it fails."""
    figures, printed = command_figures(folder, ["stats", str(dataset), "--json"])
    return figures, json.loads(printed)


def training_figures(folder: Path, dataset: Path, settings: HistoriesSettings) -> dict[str, Any]:
    """Train until the first checkpoint, and return the figures. Raises InputError if the command fails."""
    run = folder / "run"
    options = {
        "method": "id",
        "embedding-dim": settings.embedding_dim,
        "batch-users": settings.users,
        "seed": settings.seed,
        "checkpoint-every": settings.steps,
        "out": run,
        "device": "cpu",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    figures, _ = command_figures(folder, ["train", str(dataset), *words], stop_at=run / "last.safetensors")
    _, state, _ = RunFolder(run).load_last()
    under_way = state["under_way"]
    return {
        **figures,
        "steps": under_way["steps"],
        "step_ms": 1000 * under_way["seconds"] / under_way["steps"],
        "start_seconds": figures["seconds"] - under_way["seconds"],
    }


def command_figures(folder: Path, words: list[str], stop_at: Path | None = None) -> tuple[dict[str, Any], str]:
    """Run a command of the program in a new process, and return its seconds and its memory, and what it printed.

    stop_at: a file; the command gets SIGTERM when it is there. Raises InputError if the command fails, or if it takes
    longer than LONGEST seconds; no process is left.
    """
    command = [sys.executable, "-m", "iisan_fast", *words]
    environment = {**os.environ, CACHE_VARIABLE: str(folder / "parsed")}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=printed, stderr=messages, text=True, env=environment)
        try:
            with PrivateMemory(process.pid) as memory:
                code = _ended(process, stop_at, started + LONGEST)
        finally:
            process.kill()
            process.wait()
        figures = {
            "seconds": time.perf_counter() - started,
            "private_bytes": memory.peak or NOT_MEASURED,
            "file_bytes": memory.files or NOT_MEASURED,
        }
        for file in (printed, messages):
            file.seek(0)
        if code != (0 if stop_at is None else STOPPED):
            lines = messages.read().strip().splitlines() or ["it printed no message"]
            raise InputError(f"{words[0]}: ended with code {code}: {lines[-1]}")
        return figures, printed.read()


def _ended(process: subprocess.Popen[str], stop_at: Path | None, latest: float) -> int:
    """Wait for a command, and return its exit code. stop_at, latest: as in `command_figures`. Raises InputError."""
    while process.poll() is None:
        if stop_at is not None and stop_at.exists():
            process.send_signal(signal.SIGTERM)
            stop_at = None
        if time.perf_counter() > latest:
            raise InputError(f"{process.args[3]}: took longer than {LONGEST} seconds")
        time.sleep(LOOK_EVERY)
    return process.returncode
