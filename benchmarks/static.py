"""The cost of a training step on a GPU, counted without one: launches, memory and machine code.

The step of the side-network recommender is composed on meta tensors, for a batch of the dataset with known counts. Only
the host's work on a batch is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from typing import Any

from ..data import RunPlan, Sequences, steps_per_epoch
from ..errors import InputError
from ..kernels import Launch
from .floors import H200, H200_CLOCK_HZ, H200_SMS, loss_costs, side_network_costs
from .harness import Setup
from .kernel_costs import SLOTS_PER_S, KernelCost, KnownBatch, kernel_cost
from .launch_counts import LaunchCounter
from .machine_code import KernelReading, Specialization, readings, specialization
from .settings import StaticSettings, refuse_more
from .static_step import ARCHITECTURES, Sizes, count_step
from .tables import NOT_MEASURED

EPOCHS = 10  # whose batches are laid out
SIZES = Sizes()  # as published
SEED = 0  # of the epochs' order
HOST_ROUNDS = 3  # of the first epoch, whose batches' host time is measured
NOTES = {
    "launches": "of a step: Triton's launches, PyTorch's operators that make no view, copies and memsets; an operator "
    "that PyTorch runs as several kernels counts as several",
    "peak": "bytes of the model, its flat storage, the hidden states' tables, the step's memory and its window of "
    "batches, allocations rounded up to 512 bytes",
    "bytes": "of a launch: each tensor argument once if the kernel reads it and once more if it writes it; of "
    "dimensions that are bounds of the batch, and of tables' rows, the batch's true counts",
    "host": "one core's time to lay out and pack a batch, in numpy",
    "issue": f"instructions of all warps, of which an H200 issues {SLOTS_PER_S:.3g} a second: 4 a clock by each of "
    f"{H200_SMS} multiprocessors at {H200_CLOCK_HZ / 1e9} GHz; all instructions of a loop's body count in every trip, "
    "branches taken or not; a loop whose trips are not known counts as one trip, and is reported",
    "element": "instructions of a thread in the loops that multiply matrices, by element of the products that a trip "
    "makes anew; where a trip only adds to sums, by element of the sums",
    "variant": "of a kernel that a step launches in several ways: its flags that are set, its numbers that differ",
    "copies ahead": "instructions in those loops that copy to shared memory while the loop goes on",
    "floors": "an H200's least time for an op's bf16 products, exponentials, or one reading of its operands a pass",
}


def count_steps(setup: Setup, settings: StaticSettings) -> dict[str, Any]:
    """Count a step for each number of users a batch, and read its kernels.

    Raises InputError for more users than the dataset has, and where Triton is not installed.
    """
    if find_spec("triton") is None:
        raise InputError("bench static: expected the package triton, which kernels are written in; pip install triton")
    sequences = setup.sequences
    most = len(sequences.training_users)
    for users in settings.users:
        refuse_more("--users", users, most, f"the users of {setup.name}")
    batches = [CountedBatch(sequences, users, SIZES) for users in dict.fromkeys(settings.users)]
    rows = kernel_rows(batches) if settings.kernels else []
    return {
        "sizes": asdict(SIZES),
        "notes": NOTES,
        "steps": [step_row(batch, rows) for batch in batches],
        "kernels": rows or NOT_MEASURED,
    }


class CountedBatch:
    """The first batch of a run at a number of users, and the step counted for it."""

    def __init__(self, sequences: Sequences, users: int, sizes: Sizes) -> None:
        """Lay out the batch and count its step for every architecture.

        Raises InputError if histories do not fit into a tile of rows.
        """
        plan = RunPlan.of(sequences, users, SEED)
        if plan is None:
            raise InputError("max_inputs: expected histories that fit into a tile of rows")
        self.users = users
        self.sizes = sizes
        self.plan = plan
        words = plan.pack(next(plan.windows(epoch=0))).words[0]
        self.known = KnownBatch(plan.shape, words.numpy(), len(sequences.item_ids) + 1)
        self.steps = {name: count_step(plan, name, sizes) for name in ARCHITECTURES}

    @property
    def counter(self) -> LaunchCounter:
        """Return the step's counts, as configured for an H200."""
        return self.steps["sm_90"].counter


def step_row(batch: CountedBatch, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is counted of a step."""
    counter = batch.counter
    bounded = [row for row in rows if row["users"] == batch.users and row["bound_ms"] is not None]
    return {
        "users": batch.users,
        "true_counts": batch.known.counts,
        "bounds": batch.plan.shape._asdict(),
        "launches": counter.total(),
        "launches_by_part": counter.by_part(),
        "host_reads": [f"{part}: {operator}" for part, operator in counter.host_reads],
        "padded_shapes": padded_shapes(batch.plan),
        "peak_bytes": counter.peak,
        "table_bytes": batch.steps["sm_90"].table_bytes,
        "host_us": host_microseconds(batch.plan),
        "bytes": sum(row["bytes"] * row["launches"] for row in bounded) if bounded else NOT_MEASURED,
        "ops": op_rows(batch, bounded),
    }


def padded_shapes(plan: RunPlan) -> int:
    """Return how many shapes the packed batches of ten epochs have. Raises ValueError for one that does not fit."""
    windows = (plan.pack(window) for epoch in range(EPOCHS) for window in plan.windows(epoch))
    return len({window.words.shape[1:] for window in windows})


def host_microseconds(plan: RunPlan) -> float:
    """Return the least time of one core in which a batch is laid out and packed, over some epochs."""
    times = []
    for _ in range(HOST_ROUNDS):
        started = time.process_time()
        for window in plan.windows(epoch=0):
            plan.pack(window)
        times.append(time.process_time() - started)
    return 1e6 * min(times) / steps_per_epoch(plan.sequences, plan.batch_users)


def op_rows(batch: CountedBatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up the bounds of each op's launches, beside its floor where it has one."""
    counts = batch.known.counts
    sizes = batch.sizes
    towers = side_network_costs(counts["distinct"], sizes.layers, sizes.width, sizes.bottleneck)
    floors = {
        "loss": loss_costs(counts["rows"], counts["distinct"], sizes.embedding_dim)["both"].floor_ms(H200),
        "towers": towers["both"].floor_ms(H200),
    }
    ops = dict.fromkeys(part.partition(".")[0] for row in rows for part in row["parts"])
    added = []
    for op in ops:
        of_op = [row for row in rows if row["parts"][0].partition(".")[0] == op]
        figures = {
            name: sum(row[name] * row["launches"] for row in of_op) for name in ("issue_ms", "bytes_ms", "bound_ms")
        }
        added.append(
            {"op": op, "launches": sum(row["launches"] for row in of_op), **figures, "floor_ms": floors.get(op)}
        )
    return added


def kernel_rows(batches: list[CountedBatch]) -> list[dict[str, Any]]:
    """Compile the kernels of all steps and return a row for each kernel, batch and architecture."""
    wanted: dict[Specialization, None] = {}
    for batch in batches:
        for name, step in batch.steps.items():
            for _, launch in step.counter.launches:
                wanted.setdefault(specialization(launch, ARCHITECTURES[name]))
    read = dict(zip(wanted, readings(list(wanted))))
    rows = []
    for batch, name in product(batches, ARCHITECTURES):
        rows += rows_of(batch, name, read)
    return rows


def rows_of(batch: CountedBatch, architecture: str, read: dict[Specialization, KernelReading]) -> list[dict[str, Any]]:
    """Return a row for each kernel of a batch's step on an architecture; equal launches share one.

    If a kernel has several rows, each names its variant.
    """
    step = batch.steps[architecture]
    rows: dict[tuple, dict[str, Any]] = {}
    launches: list[Launch] = []  # one for each row
    for part, launch in step.counter.launches:
        wanted = specialization(launch, ARCHITECTURES[architecture])
        key = (wanted, launch.grid)
        if key in rows:
            rows[key]["launches"] += 1
            rows[key]["parts"].append(part)
            continue
        cost = kernel_cost(launch, read[wanted], batch.known, step.packed)
        rows[key] = kernel_row(batch.users, architecture, part, launch, read[wanted], cost)
        launches.append(launch)
    names = variant_names(launches)
    return [row | {"variant": name} for row, name in zip(rows.values(), names)]


def variant_names(launches: Sequence[Launch]) -> list[str]:
    """Return what tells each launch from the others of its kernel: "attend, start", "grid 4"; "" for the only one.

    A flag that is set stands as its name; a number stands as NAME=VALUE.
    """
    values = [_distinguishing_values(launch) for launch in launches]
    names = []
    for launch, launch_values in zip(launches, values):
        others = [other for other, of_other in zip(values, launches) if of_other.name == launch.name]
        words = []
        for name, value in launch_values.items():
            if all(other.get(name) == value for other in others) or value is False:
                continue
            words.append(name.lower() if value is True else f"{name.lower()}={value}")
        names.append(", ".join(words))
    return names


def _distinguishing_values(launch: Launch) -> dict[str, Any]:
    """Return a launch's constants and whole numbers by name, and its grid."""
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments))
    numbers = {name: value for name, value in arguments.items() if isinstance(value, int)}
    return {**launch.meta, **numbers, "grid": "x".join(map(str, launch.grid))}


def kernel_row(
    users: int, architecture: str, part: str, launch: Launch, reading: KernelReading, cost: KernelCost
) -> dict[str, Any]:
    """Return the figures of a kernel. Bounds are an H200's, of its own configuration."""
    on_h200 = architecture == "sm_90"
    return {
        "kernel": launch.name,
        "users": users,
        "architecture": architecture,
        "parts": [part],
        "launches": 1,
        "grid": list(launch.grid),
        "blocks": launch.configuration.blocks,
        "warps": reading.warps,
        "stages": launch.configuration.stages,
        "registers": reading.registers,
        "spilled": reading.spilled,
        "shared": reading.shared,
        "instructions": reading.instructions,
        "loop_instructions": cost.loop_instructions,
        "per_element": cost.per_element,
        "asynchronous": cost.asynchronous,
        "unknown_loops": cost.unknown_loops,
        "issue_ms": cost.issue_ms if on_h200 else None,
        "bytes": cost.bytes if on_h200 else None,
        "bytes_ms": cost.bytes_ms if on_h200 else None,
        "bound_ms": cost.bound_ms if on_h200 else None,
    }
