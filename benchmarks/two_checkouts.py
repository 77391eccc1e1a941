"""Time training steps of two checkouts beside each other: a process for each, which take turns.

    python -m iisan_fast.benchmarks.two_checkouts DATASET BEFORE --out FILE
    python -m iisan_fast.benchmarks.two_checkouts DATASET BEFORE --without-compiler --out FILE

BEFORE is the folder of another checkout, whose package the second process imports. Both train IISAN at its published
sizes with random states and the dataset's histories, from the same weights, 64 users a batch, float32, on a CPU. The
time that threads spend on a step depends less than the wall clock on what else the machine does.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import runtime
from ..errors import InputError
from .harness import folder_argument, run_script, script_parser, write_result
from .stopwatch import quantiles
from .train import largest_difference

COMMAND = "python -m iisan_fast.benchmarks.two_checkouts"
HERE = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("checkout_worker.py")
PREPARED = {  # as `runtime.prepare` sets a process up, whatever the checkout calls it
    "GOMP_SPINCOUNT": runtime.SPINS,
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(runtime.LARGEST_THRESHOLD),
}
STEPS = 3  # of a turn


def main() -> None:
    """Compare the checkouts that the command line names, and print the result."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("dataset", type=folder_argument, help="a dataset folder")
    parser.add_argument("before", type=folder_argument, help="the folder of the other checkout")
    parser.add_argument("--without-compiler", action="store_true", help="as on a machine without a C++ compiler")
    parser.add_argument("--rounds", type=int, default=24, help=f"turns of {STEPS} steps (%(default)s)")
    arguments = parser.parse_args()
    result = compare(arguments.dataset, arguments.before, arguments.rounds, arguments.without_compiler)
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        write_result(arguments.out, result)


def compare(dataset: Path, other: Path, rounds: int, without_compiler: bool) -> dict[str, Any]:
    """Return the figures of both checkouts, the medians' ratio, and where they come from."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "compiled").mkdir()
        no_compiler = {"CXX": "/nonexistent", "IISAN_FAST_COMPILED": str(folder / "compiled")}
        variables = {**os.environ, **PREPARED, **(no_compiler if without_compiler else {})}
        program = Path(shutil.copy(WORKER, folder))  # into a folder of its own, which comes first on its path
        workers = [start(program, checkout, dataset, variables) for checkout in (other.resolve(), HERE)]
        origins = [answer(worker) for worker in workers]
        times: list[list[list[float]]] = [[], []]
        for _ in range(rounds):
            for worker, worker_times in zip(workers, times):
                worker_times += answer(worker, str(STEPS))
        for worker in workers:
            worker.communicate()
    losses = [origin.pop("losses") for origin in origins]
    before, after = ({**origin, **figures(worker_times)} for origin, worker_times in zip(origins, times))
    return {
        "command": f"{COMMAND} DATASET BEFORE" + " --without-compiler" * without_compiler + f" --rounds={rounds}",
        "steps": rounds * STEPS,
        "before": before,
        "after": after,
        "ratio": after["p50_ms"] / before["p50_ms"],
        "cpu_ratio": after["p50_cpu_ms"] / before["p50_cpu_ms"],
        "largest_loss_difference": largest_difference(losses[1], losses[0]),
    }


def start(program: Path, checkout: Path, dataset: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start the process that trains by the package of a checkout."""
    environment = {**variables, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(program), str(dataset)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def answer(worker: subprocess.Popen[str], question: str = "") -> Any:
    """Return a process's next answer. Raises InputError if the process has ended."""
    assert worker.stdin is not None and worker.stdout is not None
    if question:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise InputError(f"a checkout's process ended with exit code {worker.wait()}; its message is above")
    return json.loads(line)


def figures(times: list[list[float]]) -> dict[str, float]:
    """Return the quantiles of a checkout's steps, and the median of the time that threads spent on one."""
    wall, cpu = zip(*times)
    return {**quantiles(wall, "ms"), "p50_cpu_ms": statistics.median(cpu)}


if __name__ == "__main__":
    run_script(main)
