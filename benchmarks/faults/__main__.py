"""Kill, flip and change at random, and count how each fault ended: `benchmarks/results/faults.json`.

    python -m iisan_fast.benchmarks.faults [--kills N] [--flips N] [--mutations N] [--seed N] [--out FILE]

The exit code is 1 if one of them was silent, crashed, hung, gave a traceback or took too much memory.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..harness import run_script, script_parser, write_result
from ..machine import origin
from .flips import flip_once
from .kills import kill_once
from .mutations import mutate
from .sample import make_sample

COMMAND = "python -m iisan_fast.benchmarks.faults"
GOOD = ("equal", "refused", "said", "repaired", "harmless", "accepted")


def main() -> None:
    """Make the faults that the command line asks for, and print the counts."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("--kills", type=int, default=100, help="trials of kills (%(default)s)")
    parser.add_argument("--flips", type=int, default=500, help="flipped bits (%(default)s)")
    parser.add_argument("--mutations", type=int, default=2000, help="changed files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (%(default)s)")
    arguments = parser.parse_args()
    counts = {name: getattr(arguments, name) for name in ("kills", "flips", "mutations")}
    result = {
        "command": " ".join([COMMAND, *(f"--{name}={count}" for name, count in counts.items())])
        + f" --seed={arguments.seed}",
        **origin("demo", torch.device("cpu")),
        **make_faults(**counts, seed=arguments.seed),
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        write_result(arguments.out, result)
    sys.exit(1 if any(result[name]["faults"] for name in counts) else 0)


def make_faults(kills: int, flips: int, mutations: int, seed: int = 0) -> dict[str, Any]:
    """Return the counts of outcomes by kind of fault, and each fault that was not taken well.

    Kills, flips and mutations have a process each, which run at the same time.
    """
    with TemporaryDirectory() as folder:
        sample = make_sample(Path(folder) / "sample")
        trials: dict[str, Iterator[dict[str, Any]]] = {
            "kills": (kill_once(sample, number) for number in range(seed, seed + kills)),
            "flips": (flip_once(sample, number) for number in range(seed, seed + flips)),
            "mutations": mutate(sample, range(seed, seed + mutations)),
        }
        fork = multiprocessing.get_context("fork")  # generators cannot be sent to a process that is started anew
        results = {}
        for name, outcomes in trials.items():
            results[name], sending = fork.Pipe(duplex=False)
            fork.Process(target=_send_counts, args=(sending, outcomes)).start()
            sending.close()
        return {name: receiving.recv() for name, receiving in results.items()}


def _send_counts(sending: Connection, outcomes: Iterable[dict[str, Any]]) -> None:
    """Count outcomes and send the counts."""
    sending.send(counted(outcomes))


def counted(outcomes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of outcomes by kind, and the faults whole."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    faults = []
    slowest = largest = 0.0
    kills = trials = 0
    for outcome in outcomes:
        trials += 1
        by_kind[outcome["kind"]][outcome["outcome"]] += 1
        slowest = max(slowest, outcome.get("seconds", 0.0))
        largest = max(largest, outcome.get("grown_bytes", 0))
        kills += outcome.get("kills", 0)
        if outcome["outcome"] not in GOOD:
            faults.append(outcome)
            print(f"fault: {json.dumps(outcome)[:1500]}", file=sys.stderr, flush=True)
    total = sum(by_kind.values(), Counter())
    result = {
        "trials": trials,
        "outcomes": dict(total),
        "by_kind": {kind: dict(by_kind[kind]) for kind in sorted(by_kind)},
    }
    if kills:
        result["kills"] = kills
    if slowest:
        result |= {"slowest_seconds": slowest, "largest_growth_bytes": int(largest)}
    return {**result, "faults": faults}


if __name__ == "__main__":
    run_script(main)
