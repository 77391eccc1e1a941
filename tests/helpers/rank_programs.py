"""Run the program on several ranks, forked in milliseconds and started as srun starts them: rank 0 holds the store."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rank_processes import PRELOADED

MODULES = [*PRELOADED, "iisan_fast.cli", "helpers.failing_ranks"]


@dataclass
class RankResult:
    """The end of a rank's process. returncode: -n if the signal n killed it; None if it was still there at the end."""

    returncode: int | None
    stdout: str
    stderr: str


def run_programs(
    folder: Path,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    variables: Sequence[dict[str, str]] | None = None,
    seconds: float = 60,
) -> list[RankResult]:
    """Call `function(arguments[rank])` in a process for each rank, and return how each has ended.

    variables: of each process's environment; by default those of a launcher. No process is left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    variables = variables or launcher_variables(len(arguments))
    processes = [
        context.Process(target=_run, args=(folder / str(rank), variables[rank], function, argument), daemon=True)
        for rank, argument in enumerate(arguments)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [
        RankResult(code, *((folder / f"{rank}.{name}").read_text() for name in ("out", "err")))
        for rank, code in enumerate(codes)
    ]


def launcher_variables(count: int, **changes: str) -> list[dict[str, str]]:
    """Return the variables that a launcher sets for each of several ranks on this machine."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **changes}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]


def free_port() -> int:
    """Return a port of this machine that nothing uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _run(files: Path, variables: dict[str, str], function: Callable[..., Any], argument: Any) -> None:
    """Write what the function prints into files, and end as it does."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        with open(f"{files}{suffix}", "w") as file:
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ |= variables
    function(argument)
