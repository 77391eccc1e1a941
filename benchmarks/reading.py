"""Read a synthetic dataset by polars, by the strict reader, and by another checkout: seconds and peak memory.

    python -m iisan_fast.benchmarks.reading [--before CHECKOUT] [--interactions N] [--out FILE]

Every reading has a new process; the readers take turns. CHECKOUT is the folder of an earlier version.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import CACHE_VARIABLE
from .harness import folder_argument, run_script, script_parser, write_result
from .machine import commit, origin

COMMAND = "python -m iisan_fast.benchmarks.reading"
HERE = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("reading_worker.py")
ITEMS = 100_000
SHORTEST = 5  # interactions of a user
MEAN = 9
NOTES = {
    "seconds": "load_dataset in a new process, the import of polars and the arrays that it keeps of a large dataset "
    "included, and the import of the package not",
    "cpu_seconds": "the time that all threads spent on it, which depends less on what else the machine does",
    "peak_rss_bytes": "the largest resident set of that process, Python and its libraries included",
}


def main() -> None:
    """Measure the readers that the command line asks for, and print the result."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("--before", type=folder_argument, help="the folder of another checkout")
    parser.add_argument("--interactions", type=int, default=1_800_000, help="of the dataset (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="readings by each reader (%(default)s)")
    arguments = parser.parse_args()
    result = compare(arguments.before, arguments.interactions, arguments.rounds)
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        write_result(arguments.out, result)


def compare(before: Path | None, interactions: int, rounds: int) -> dict[str, Any]:
    """Return each reader's medians, and where they come from. Raises ValueError if the readers read different data."""
    readers: dict[str, list[str]] = {"polars": [str(HERE)], "strict": [str(HERE), "--without-polars"]}
    if before is not None:
        readers = {"before": [str(before.resolve())], **readers}
    readings: dict[str, list[dict[str, Any]]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), interactions)
        for _ in range(rounds):
            for name, (checkout, *options) in readers.items():
                readings[name].append(read(Path(folder), Path(checkout), options))
    digests = {reading["digest"] for of_reader in readings.values() for reading in of_reader}
    if len(digests) > 1:
        raise ValueError(f"expected equal datasets of all readers, found {len(digests)} different ones")
    command = COMMAND + " --before=CHECKOUT" * (before is not None)
    return {
        "command": f"{command} --interactions={interactions} --rounds={rounds}",
        **origin("synthetic", torch.device("cpu")),
        "notes": NOTES,
        "interactions": interactions,
        "rounds": rounds,
        **({"before_commit": commit(before)} if before else {}),
        **{name: medians(of_reader) for name, of_reader in readings.items()},
    }


def write_dataset(folder: Path, interactions: int) -> None:
    """Write items.tsv and users.tsv: items drawn uniformly, MEAN interactions a user and at least SHORTEST."""
    generator = np.random.default_rng(0)
    lengths = generator.geometric(1 / (MEAN - SHORTEST + 1), -(-interactions // SHORTEST)) + SHORTEST - 1
    lengths = lengths[np.cumsum(lengths) <= interactions]
    lengths[-1] += interactions - lengths.sum()
    item_ids = [f"B{number:08d}" for number in range(ITEMS)]
    titles = (f"{item_id}\tProduct {number} &amp; its title\n" for number, item_id in enumerate(item_ids))
    (folder / "items.tsv").write_text("".join(titles))
    histories = np.split(generator.integers(0, ITEMS, interactions), np.cumsum(lengths)[:-1])
    with (folder / "users.tsv").open("w") as file:
        for user, history in enumerate(histories):
            words = [item_ids[item] for item in history]
            file.write(f"U{user:09d}\t{' '.join(words)}\n")


def read(dataset: Path, checkout: Path, options: list[str]) -> dict[str, Any]:
    """Return the figures and the digest of one reading by the package of a checkout."""
    command = [sys.executable, "-c", WORKER.read_text(), str(dataset), *options]
    with tempfile.TemporaryDirectory() as parsed:  # so that no reading finds the arrays of the one before
        environment = {**os.environ, "PYTHONPATH": str(checkout), CACHE_VARIABLE: parsed}
        result = subprocess.run(command, env=environment, cwd=dataset, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def medians(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a reader's medians and the least and largest seconds."""
    seconds = [reading["seconds"] for reading in readings]
    return {
        "seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "largest_seconds": max(seconds),
        "cpu_seconds": statistics.median(reading["cpu_seconds"] for reading in readings),
        "peak_rss_bytes": statistics.median(reading["peak_rss_bytes"] for reading in readings),
    }


if __name__ == "__main__":
    run_script(main)
