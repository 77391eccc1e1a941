"""Time training steps of two checkouts beside each other: a process for each, which take turns.

    python benchmarks/two_checkouts.py DATASET BEFORE --out FILE
    python benchmarks/two_checkouts.py DATASET BEFORE --without-compiler --out FILE

BEFORE is the folder of another checkout, whose package the second process imports. Both train IISAN at its published
sizes with random states and the dataset's histories, from the same weights, 64 users a batch, float32, on a CPU. The
time that threads spend on a step depends less than the wall clock on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iisan_fast import runtime
from iisan_fast.bench import machine
from iisan_fast.bench import train as bench

HERE = Path(__file__).resolve().parent.parent
PREPARED = {  # as `runtime.prepare` sets a process up, whatever the checkout calls it
    "GOMP_SPINCOUNT": runtime.SPINS,
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(runtime.LARGEST_THRESHOLD),
}
FOLLOWED_STEPS = 20  # before any is timed
STEPS = 3  # of a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("before", type=Path, help="the folder of the other checkout")
    parser.add_argument("--without-compiler", action="store_true", help="as on a machine without a C++ compiler")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.dataset)
        return
    result = compare(arguments)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both checkouts, the medians' ratio, and where they come from."""
    with tempfile.TemporaryDirectory() as empty:
        more = {"CXX": "/nonexistent", "IISAN_FAST_COMPILED": empty} if arguments.without_compiler else {}
        workers = [start(folder, arguments, more) for folder in (arguments.before, HERE)]
        origins = [answer(worker) for worker in workers]
        times: list[list[list[float]]] = [[], []]
        for _ in range(arguments.rounds):
            for worker, of_worker in zip(workers, times):
                of_worker += answer(worker, "step")
        for worker in workers:
            worker.communicate()
    losses = [origin.pop("losses") for origin in origins]
    before, after = ({**origin, **figures(of_worker)} for origin, of_worker in zip(origins, times))
    return {
        "command": "python benchmarks/two_checkouts.py DATASET BEFORE"
        + " --without-compiler" * arguments.without_compiler
        + f" --rounds={arguments.rounds}",
        "steps": arguments.rounds * STEPS,
        "before": before,
        "after": after,
        "ratio": after["p50_ms"] / before["p50_ms"],
        "cpu_ratio": after["p50_cpu_ms"] / before["p50_cpu_ms"],
        "largest_loss_difference": bench.largest_difference(losses[1], losses[0]),
    }


def start(folder: Path, arguments: argparse.Namespace, more: dict[str, str]) -> subprocess.Popen[str]:
    """Start the process that trains by the package of a checkout."""
    environment = {**os.environ, **PREPARED, "PYTHONPATH": str(folder.resolve()), **more}
    command = [sys.executable, __file__, str(arguments.dataset), str(folder), "--worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def answer(worker: subprocess.Popen[str], question: str = "") -> Any:
    """Return a process's next answer."""
    if question:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(dataset: Path) -> None:
    """Report the first losses and the package's origin, then the milliseconds of a turn for each line that comes in."""
    device = torch.device("cpu")
    settings = bench.TrainSettings()
    name, sequences = machine.named_sequences(dataset)
    operands = bench.FORMS["float32"], sequences, bench.random_states(sequences, settings), settings, device
    step = bench.start(*operands).step if hasattr(bench, "start") else bench.make_step(*operands)  # as ece325b has it
    losses = bench.follow(step, FOLLOWED_STEPS)
    print(json.dumps({**machine.origin(name, device), "losses": losses}), flush=True)
    for _ in sys.stdin:
        print(json.dumps([timed(step) for _ in range(STEPS)]), flush=True)


def timed(step: Callable[[], Any]) -> list[float]:
    """Return the milliseconds of a step by the wall clock, and those that all threads spent on it."""
    clocks = time.perf_counter, time.process_time
    started = [clock() for clock in clocks]
    step()
    return [1000 * (clock() - start) for clock, start in zip(clocks, started)]


def figures(times: list[list[float]]) -> dict[str, float]:
    """Return the quantiles of a checkout's steps, and the median of the time that threads spent on one."""
    wall, cpu = zip(*times)
    return {**bench.quantiles(list(wall)), "p50_cpu_ms": statistics.median(cpu)}


if __name__ == "__main__":
    main()
