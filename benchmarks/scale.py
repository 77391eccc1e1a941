"""The time, memory and exchanged bytes of training steps over tables of up to a million items.

States are random and repeat every 4,096 items, since times do not depend on their values. All catalogues read one
cache: a smaller one has its first items. Histories are synthetic; a few popular items hold most interactions. Each
measurement has new processes, which `scale_worker` runs; torchrun starts several ranks.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..progress import progress_bar
from ..states import free_memory, size_text
from .drawing import two_panels
from .harness import Setup
from .made_states import VIEWS, make_states
from .scale_worker import USERS_AN_ITEM, WARM_UP_STEPS, TableMeasurement
from .settings import ScaleSettings

CPU = torch.device("cpu")
FITS = 0.7  # the share of free memory that a table may take, over all ranks
LONGEST = 400  # seconds of a measurement
ENDING = 10  # seconds that torchrun has to end its processes
LARGEST_DIFFERENCE = 1e-3  # relative, of a loss in float32, to that of one rank
NOTES = {
    "device": "one rank; the whole table in host memory, where the kernels read it",
    "mapped": "one rank; rows are read from the cache's file ahead of the step, and their checksums compared",
    "sharded": "several ranks of one machine, joined by torchrun over Gloo on loopback; each holds its items' rows in "
    "host memory, and rows are exchanged ahead of the step",
    "step": f"p20, p50 and p80 of the steps after {WARM_UP_STEPS} to warm up, by the wall clock of rank 0, with the "
    "wait for the next batch",
    "waited": "waited_ms: the median of that wait, near 0 if rows are gathered within the step before; waited_share: "
    "of all waits in all steps",
    "gather": "the median time in which the loader's thread gathers a batch's rows, beside the steps",
    "private": "the largest sum of RssAnon and RssShmem in /proc/self/status, looked at every 0.02 s, of the rank that "
    "has most: heaps, stacks and anonymous maps, Python, PyTorch and the histories included",
    "files": "likewise the largest RssFile: resident pages of files, which the system takes back if it needs memory",
    "received_bytes": "of rank 0 a step, from other ranks. rows: of the table. vectors: item vectors, and their "
    "gradients. weights: their gradients. Sums are counted as a ring exchanges them",
    "loss_difference": "the largest relative difference of a step's loss to that of one rank with the mapped table; "
    "first_difference: of the first step's. Both are rounding in float32, which Adam's first steps make larger",
    "users": f"{USERS_AN_ITEM} an item, as in Scientific",
}


def measure_scale(setup: Setup, settings: ScaleSettings) -> dict[str, Any]:
    """Take steps over every catalogue and table. Raises InputError if the losses of two tables differ."""
    rows: list[dict[str, Any]] = []
    with cache_folder(setup.folder) as cache:
        with progress_bar("states", settings.items[-1], "items") as written:
            make_states(cache, settings.items[-1], settings.layers, settings.width, written)
        forms = [("mapped", 1), ("device", 1), ("sharded", settings.ranks)]
        with progress_bar("scale", len(settings.items) * len(forms), "measurements") as advance:
            for items in settings.items:
                expected: list[float] = []
                for table, ranks in forms:
                    row = measured_row(cache, items, table, ranks, settings)
                    if "why" not in row:
                        expected = expected or row["losses"]
                        row |= differences(row, row.pop("losses"), expected)
                    rows.append(row)
                    advance(1, f"{items:,} items, {table}")
    return {"notes": NOTES, "rows": rows}


@contextmanager
def cache_folder(kept: Path | None) -> Iterator[Path]:
    """Yield the folder of the cache: one that is kept, or one that is removed at the end."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="iisan-fast-scale-") as folder:
        yield Path(folder) / "cache"


def measured_row(cache: Path, items: int, table: str, ranks: int, settings: ScaleSettings) -> dict[str, Any]:
    """Return the figures of a table, with the losses; the reason why not, if it does not fit into memory."""
    size = len(VIEWS) * (items + 1) * settings.layers * settings.width * torch.bfloat16.itemsize
    row: dict[str, Any] = {"items": items, "table": table, "ranks": ranks, "table_bytes": size}
    free = free_memory(CPU)
    if table != "mapped" and free is not None and size > FITS * free:
        return {**row, "why": f"needs {size_text(size)}, more than {FITS:.0%} of the {size_text(free)} free"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        measurement = TableMeasurement(
            str(cache), items, table, settings.steps, settings.users, settings.seed, str(out)
        )
        run_worker(measurement, ranks)
        of_ranks = json.loads(out.read_text())
    return {
        **row,
        **of_ranks[0],
        "private_bytes": most(of_ranks, "private_bytes"),
        "file_bytes": most(of_ranks, "file_bytes"),
    }


def run_worker(measurement: TableMeasurement, ranks: int) -> None:
    """Run `scale_worker` in a new process, or in several that torchrun starts.

    Raises InputError if it fails, or if it takes longer than LONGEST seconds; no process is left.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", f"{__package__}.scale_worker", json.dumps(asdict(measurement))]
    name = f"{measurement.items:,} items, {measurement.table}, {ranks} ranks"
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=printed, text=True)
        try:
            code = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            raise InputError(f"{name}: not measured within {LONGEST} seconds") from None
        finally:
            end(process)
        if code:
            printed.seek(0)
            raise InputError(f"{name}: the process ended with code {code}: {printed.read().strip()[-2000:]}")


def end(process: subprocess.Popen[str]) -> None:
    """End a process that still runs; torchrun ends its own processes when it is asked to."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def most(of_ranks: list[dict[str, Any]], name: str) -> int | None:
    """Return the largest figure of the ranks; None if the system does not tell it."""
    return max((figures[name] for figures in of_ranks if figures[name] is not None), default=None)


def differences(row: dict[str, Any], losses: list[float], expected: list[float]) -> dict[str, float]:
    """Return the relative differences of the losses. Raises InputError if they are more than rounding."""
    of_steps = [abs(loss - other) / abs(other) for loss, other in zip(losses, expected, strict=True)]
    if not all(difference <= LARGEST_DIFFERENCE for difference in of_steps):  # one may be NaN
        raise InputError(
            f"{row['items']:,} items, {row['table']}: expected the losses of one rank with the mapped table, found a "
            f"relative difference of {max(of_steps):.1e}"
        )
    return {"first_difference": of_steps[0], "loss_difference": max(of_steps), "last_loss": losses[-1]}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a PNG of two panels: the time of a step, and the private memory of a rank, against the catalogue."""
    environment, settings = result["environment"], result["settings"]
    shape = f"2 views of {settings['layers']} layers of {settings['width']}"
    title = f"Steps of {settings['users']} users, {shape}; {environment['device']}, {environment['threads']} threads"
    rows = [row for row in result["rows"] if "why" not in row]
    with two_panels(path, title) as (times, memory):
        for (table, ranks), label in forms(rows).items():
            of_form = [row for row in rows if (row["table"], row["ranks"]) == (table, ranks)]
            items = [row["items"] for row in of_form]
            times.plot(items, [row["p50_ms"] for row in of_form], "o-", label=label)
            memory.plot(items, [row["private_bytes"] / 2**30 for row in of_form], "o-", label=label)
        sizes = {row["items"]: row["table_bytes"] / 2**30 for row in result["rows"]}
        memory.plot(list(sizes), list(sizes.values()), "k--", label="the whole table")
        times.set(xlabel="items in the catalogue", ylabel="ms", title="A step", xscale="log")
        times.set_ylim(bottom=0)
        memory.set(xlabel="items in the catalogue", ylabel="GiB", title="Private memory of a rank", xscale="log")
        memory.set_yscale("log")


def forms(rows: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Return the label of each table and number of ranks."""
    words = {"mapped": "in the cache's file", "device": "in memory", "sharded": "sharded"}
    return {
        (row["table"], row["ranks"]): f"{words[row['table']]}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}"
        for row in rows
    }
