"""Train steps by the package that PYTHONPATH names: one side of `two_checkouts`.

    python checkout_worker.py DATASET

The first line of output is the package's origin and its first losses. Each line of input is a number of steps; its
answer is a list of [milliseconds by the wall clock, milliseconds that all threads spent], an entry a step.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLLOWED_STEPS = 20  # before any is timed


def main() -> None:
    """Report the first losses and the package's origin, then the times that are asked for."""
    device = torch.device("cpu")
    train, machine = module("train"), module("machine")
    settings = train.TrainSettings()
    name, sequences = machine.named_sequences(Path(sys.argv[1]))
    operands = train.FORMS["float32"], sequences, train.random_states(sequences, settings), settings, device
    started = train.start(*operands).step if hasattr(train, "start") else train.make_step(*operands)  # as at ece325b
    losses = train.follow(started, FOLLOWED_STEPS)
    print(json.dumps({**machine.origin(name, device), "losses": losses}), flush=True)
    for line in sys.stdin:
        times = [timed(started) for _ in range(int(line))]
        print(json.dumps(times), flush=True)


def module(name: str) -> ModuleType:
    """Import a module of the benchmarks. Raises ModuleNotFoundError if the package has none of that name."""
    room = "bench" if importlib.util.find_spec("iisan_fast.bench") else "benchmarks"  # "bench" in earlier checkouts
    return importlib.import_module(f"iisan_fast.{room}.{name}")


def timed(step: Callable[[], Any]) -> list[float]:
    """Return the milliseconds of a step by the wall clock, and those that all threads spent on it."""
    clocks = time.perf_counter, time.process_time
    started = [clock() for clock in clocks]
    step()
    return [1000 * (clock() - start) for clock, start in zip(clocks, started)]


if __name__ == "__main__":
    main()
