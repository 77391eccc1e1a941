"""Import synthetic files of several formats, each in a new process: seconds and peak memory.

    python -m iisan_fast.benchmarks.imports [--interactions N …] [--format csv jsonl parquet] [--out FILE]

The interactions have no order; a few popular items hold most of them.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .harness import run_script, script_parser, write_result
from .peak_memory import PeakMemory

COMMAND = "python -m iisan_fast.benchmarks.imports"
ITEMS = 200_000
INTERACTIONS_A_USER = 10  # on average
POPULARITY = 3.0  # an item's number is a uniform number to this power
FIRST, LAST = 1_580_000_000_000, 1_680_000_000_000  # timestamps, in milliseconds
PART = 1_000_000  # rows drawn at a time
FORMATS = ("csv", "jsonl", "parquet")
NOTES = {
    "seconds": "one import, from the start of reading to the finished folder",
    "peak": "the largest sum of proportional set sizes, Python, numpy and polars with its threads included",
    "bytes_an_interaction": "what the peak lies above the process before the import, divided by the interactions",
}


def main() -> None:
    """Measure an import of each size and format and print its row."""
    from torch import device  # here, since the measured processes run this file too and need none of it

    from .machine import origin
    from .processes import in_a_process

    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("--interactions", type=int, nargs="+", default=[10_000_000], help="of each import (10000000)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="of the files (all)")
    arguments = parser.parse_args()
    sizes = arguments.interactions
    formats = arguments.format
    machine = origin("synthetic", device("cpu"))  # of the code as it starts: it may be another by the time this ends
    rows = []
    for interactions in sizes:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "interactions.csv"
            write_interactions(text, interactions)
            for name in formats:
                rows.append(in_a_process(measure, converted(text, name)))
                print(json.dumps(rows[-1]))
    words = [COMMAND, "--interactions", *map(str, sizes), "--format", *formats]
    import polars as pl

    libraries = {"polars": pl.__version__, "polars_threads": pl.thread_pool_size()}
    result = {"command": " ".join(words), **machine, **libraries, "notes": NOTES, "rows": rows}
    if arguments.out is not None:
        write_result(arguments.out, result)


def write_interactions(path: Path, interactions: int) -> None:
    """Write a CSV file with a header."""
    import polars as pl

    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, interactions, PART):
            count = min(PART, interactions - start)
            part = {
                "user": generator.integers(0, max(1, interactions // INTERACTIONS_A_USER), count),
                "item": (ITEMS * generator.random(count) ** POPULARITY).astype(np.int64),
                "timestamp": generator.integers(FIRST, LAST, count),
            }
            pl.DataFrame(part).write_csv(file, include_header=start == 0)


def converted(text: Path, name: str) -> Path:
    """Return the file of a format with the rows of a CSV file, which is written beside it."""
    import polars as pl

    path = text.with_suffix(f".{name}")
    rows = pl.scan_csv(text)
    if name == "jsonl":
        rows.sink_ndjson(path)
    elif name == "parquet":
        rows.sink_parquet(path)
    return path


def measure(source: Path) -> dict[str, Any]:
    """Import a file into a folder beside it and return the time and the memory that this takes."""
    from ..data import import_files  # needs polars, which not every installation has

    with PeakMemory() as before:
        pass
    started = time.perf_counter()
    with PeakMemory() as peak:
        imported = import_files(source, source.with_name(f"dataset-{source.suffix}"))
    seconds = time.perf_counter() - started
    return {
        "format": source.suffix.removeprefix("."),
        "interactions": imported.interactions,
        "users": imported.users,
        "items": imported.items,
        "source_bytes": source.stat().st_size,
        "seconds": seconds,
        "peak_pss_bytes": peak.bytes,
        "bytes_an_interaction": (peak.bytes - before.bytes) / imported.interactions,
    }


if __name__ == "__main__":
    run_script(main)
