"""Read a dataset once by the package that PYTHONPATH names: one reading of `reading`.

    python reading_worker.py DATASET [--without-polars]

It prints the seconds by the clock and by the CPU, the peak of the process's resident set in bytes, and a digest of all
that was read.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from iisan_fast.data import load_dataset


def main() -> None:
    """Read the dataset and print the figures."""
    if "--without-polars" in sys.argv:
        sys.modules["polars"] = None  # type: ignore[assignment]  # an import of it then fails
    started = time.perf_counter()
    cpu_started = time.process_time()
    dataset = load_dataset(Path(sys.argv[1]))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    digest = hashlib.sha256(json.dumps([dataset.titles, dataset.captions]).encode())
    sequences = dataset.sequences
    digest.update(json.dumps([list(sequences.user_ids), sequences.item_ids]).encode())
    for array in (sequences.offsets, sequences.items, sequences.training_ends, *sequences.targets.values()):
        digest.update(array.astype(np.int64).tobytes())  # item numbers are narrower in a file
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": int(peak[1]) << 10 if peak else None,
        "digest": digest.hexdigest(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
