"""Functions that place the runs of sweeps on the ranks of a job; the processes import them from here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from iisan_fast.benchmarks.placed_work import placed_work
from iisan_fast.errors import InputError
from iisan_fast.ranks import ALONE, Ranks, joined_ranks, leave_job, threads_of_rank

FAILING = "lora"


def placed(ranks: Ranks, works: dict[str, int]) -> tuple[list[int], dict[str, tuple[int, str]]]:
    """Return the work that this rank has done, and the failures: of all odd numbers."""
    done: list[int] = []

    def do(number: int) -> None:
        done.append(number)
        if number % 2:
            raise InputError(f"{number} is odd")

    return done, placed_work("sweep", works, do, ranks)


def left_alone(ranks: Ranks) -> tuple[int, bool, int]:
    """Return the number of ranks, and, once the process has left its job, if it is alone, and its threads."""
    threads = threads_of_rank()
    torch.set_num_threads(threads + 1)
    leave_job(threads)
    return ranks.count, joined_ranks() is ALONE, torch.get_num_threads()


def sweep(ranks: Ranks, dataset: Path, out: Path, settings: Any) -> tuple[list[str], str]:
    """Run a sweep whose cells write their rank alone, and all of one method fail.

    settings: MethodsSettings. Returns what this rank has encoded and run, and the message of the error.
    """
    from iisan_fast.benchmarks import cells  # imports transformers
    from iisan_fast.benchmarks.harness import Setup

    done: list[str] = []

    def encode(_function: Callable[..., Any], _config: Any, _settings: Any, _views: Any, folder: Path, *_: Any) -> None:
        done.append(f"encoded {folder.name}")

    def run(cell: cells.Cell, _dataset: Path, out: Path, *_: Any) -> None:
        done.append(f"{cell.encoders} {cell.method} {cell.seed}")
        if cell.method == FAILING:
            raise InputError("it fails")
        folder = cell.folder(out)
        folder.mkdir(parents=True)
        (folder / cells.FIGURES).write_text(json.dumps({"rank": ranks.rank}))

    with patch.object(cells, "in_a_process", encode), patch.object(cells, "_run_cell", run):
        try:
            cells.run_sweep(Setup(dataset, torch.device("cpu"), out, ranks), settings.sweep)
        except InputError as error:
            return done, str(error)
    return done, ""
