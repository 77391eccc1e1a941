"""Load a table of hidden states from a cache with and without comparing the checksums: seconds, and CPU seconds.

    python -m iisan_fast.benchmarks.checked_loading [--items N] [--rounds N] [--out FILE]

The cache is synthetic and in the page cache. Both ways take turns in one process, on one thread.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..states import Store, content_digest, load_table
from .harness import run_script, script_parser, write_result
from .machine import origin

COMMAND = "python -m iisan_fast.benchmarks.checked_loading"
CPU = torch.device("cpu")
LAYERS, WIDTH = 7, 768
DIGEST_BYTES, CHECKSUM_BYTES = 16, 8  # of an entry, before and after its states
VIEW = {
    "source": "image",
    "layers": list(range(LAYERS)),
    "depth": LAYERS,
    "width": WIDTH,
    "dtype": "bfloat16",
}
NOTES = {
    "checked": "the states as a run loads them: the digest of all contents, then load_table of all items into memory, "
    "each entry compared with its checksum",
    "unchecked": "the same, with a reader that leaves the comparison out",
    "digests": "the digests of all items' contents, as training reads them",
    "sound_digests": "the same, after all states were compared with their checksums, as an extraction reads them",
    "cpu_seconds": "of the one thread that reads, which depends less on what else the machine does",
    "ratio": "the median of the rounds' ratios of CPU seconds, checked to unchecked",
}


class UncheckedStore(Store):
    """A store that reads states without comparing their checksums."""

    def read(self, view: str, item_ids: list[str], into: Tensor, positions: list[int] | None = None) -> None:
        """Copy the items' states into the tensor `into` [N, K, D]. Raises InputError if an item is missing."""
        target = into.view(torch.int16).numpy()
        for row, _, entry in self._entries(view, item_ids):
            states = np.frombuffer(entry[:-CHECKSUM_BYTES], target.dtype, offset=DIGEST_BYTES).reshape(LAYERS, WIDTH)
            target[row] = states if positions is None else states[positions]


def main() -> None:
    """Measure, and print the result."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("--items", type=int, default=20_000, help="of the cache (%(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="of each way (%(default)s)")
    arguments = parser.parse_args()
    result = compare(arguments.items, arguments.rounds)
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        write_result(arguments.out, result)


def compare(items: int, rounds: int) -> dict[str, Any]:
    """Return the medians of each way, and where they come from."""
    item_ids = [f"B{number:09d}" for number in range(items)]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        write_cache(cache, item_ids)
        ways: dict[str, Callable[[], Any]] = {
            "checked": lambda: _load(Store(cache), item_ids),
            "unchecked": lambda: _load(UncheckedStore(cache), item_ids),
            "digests": lambda: _all_digests(cache, Store.digests, item_ids),
            "sound_digests": lambda: _all_digests(cache, Store.sound_digests, item_ids),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            names = list(ways) if number % 2 else list(ways)[::-1]  # the neighbours differ least in what else runs
            for name in names:
                times[name].append(timed(ways[name]))
    figures = {name: medians(of_way[1:]) for name, of_way in times.items()}  # the first round warms up
    return {
        "command": f"{COMMAND} --items={items} --rounds={rounds}",
        **origin("synthetic", CPU),
        "notes": NOTES,
        "items": items,
        "rounds": rounds,
        "bytes": items * 2 * LAYERS * WIDTH,
        **figures,
        "ratio": statistics.median(
            checked[1] / unchecked[1] for checked, unchecked in zip(times["checked"][1:], times["unchecked"][1:])
        ),
    }


def write_cache(cache: Path, item_ids: list[str]) -> None:
    """Fill a cache with random states of one view, v."""
    generator = torch.Generator().manual_seed(0)
    with Store(cache, writable=True) as store:
        store.add_views({"v": VIEW})
        for start in range(0, len(item_ids), 1024):
            part = item_ids[start : start + 1024]
            states = torch.randn((len(part), LAYERS, WIDTH), generator=generator).bfloat16()
            store.write("v", part, [content_digest(item_id.encode()) for item_id in part], states)


def timed(way: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a call."""
    started = time.perf_counter()
    cpu_started = time.thread_time()
    way()
    cpu_seconds = time.thread_time() - cpu_started
    return time.perf_counter() - started, cpu_seconds


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of pairs of seconds and CPU seconds, and the least of each."""
    seconds, cpu_seconds = zip(*times)
    return {
        "seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "least_cpu_seconds": min(cpu_seconds),
    }


def _load(store: Store, item_ids: list[str]) -> None:
    """Load the states as a run does, which also compares the digest of all contents."""
    store.contents("v", item_ids)
    load_table(store, ["v"], item_ids, CPU, "device")


def _all_digests(cache: Path, read: Callable[..., Any], item_ids: list[str]) -> list[bytes | None]:
    """Return all digests of the cache, by one of the store's two functions."""
    with Store(cache) as store:
        return list(read(store, "v", item_ids))


if __name__ == "__main__":
    run_script(main)
