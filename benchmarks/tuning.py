"""Search launch configurations on the GPU at hand, for the table in kernels/gpu/configurations.py.

Nothing is tuned while training: the table alone decides, so that equal calls run equal code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import CONFIGURATIONS, Configuration, launches, table_entry
from ..progress import progress_bar
from .harness import Setup
from .machine import on
from .op_cases import OpCase, Run, make_cases, random_tables
from .op_rows import timed_call
from .settings import TUNED_OPS, KernelSettings

SIZES = {"small": 64, "large": 8192}  # users a batch that stand for the table's sizes of bf16 and fp16
LADDERS = {
    "BM": (16, 32, 64, 128),
    "BN": (16, 32, 64, 128),
    "BD": (16, 32, 64, 128, 256),
    "BQ": (32, 64, 128),
    "CHUNKS": (1, 2, 4, 8, 1024),  # of the width, a program; 1024: all of them
    "GROUP": (1, 2, 4, 7),
    "SUB": (1, 2, 4),
    "PROGRAMS": (132, 264, 528, 1056, 2112),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
}
GAIN = 0.02  # a candidate that is not faster by this share is noise
TOLERANCE = 0.01  # of the norm of what the shipped configuration computes: other tiles round bf16 otherwise

log = logging.getLogger("iisan_fast.kernels")


@dataclass(frozen=True)
class TunedKernel:
    """The best configuration of a kernel, and the numbers of configurations that were tried and skipped."""

    kernel: str
    size: str
    best: Configuration
    ms: float  # of the op's pass that the kernel is a part of
    shipped_ms: float
    tried: int
    skipped: int


def check_tunable(settings: KernelSettings, device: torch.device) -> None:
    """Raise InputError without a CUDA GPU, and for settings that tuning does not take."""
    if device.type != "cuda":
        raise InputError("--tune needs a CUDA GPU")
    if settings.forms:
        raise InputError("--tune: takes no --form; it tunes Triton's")
    if settings.users:
        raise InputError(f"--tune: takes no --users; it uses batches of {' and '.join(map(str, SIZES.values()))}")
    if other := set(settings.op_names) - set(TUNED_OPS):
        raise InputError(f"--tune: expected --op {', '.join(TUNED_OPS)}, found {', '.join(sorted(other))}")


def tuned_entries(setup: Setup, settings: KernelSettings) -> list[dict[str, Any]]:
    """Search the configurations of all kernels and return a JSON object for each. Raises InputError as `tune` does."""
    return as_json(tune(setup, settings), setup.device)


def tune(setup: Setup, settings: KernelSettings) -> list[TunedKernel]:
    """Tune every kernel of the ops at both sizes in bf16.

    Raises InputError as `check_tunable` does, and for a dataset of too few users.
    """
    device = setup.device
    check_tunable(settings, device)
    sequences = setup.sequences
    if len(sequences.user_ids) < max(SIZES.values()):
        raise InputError(f"--tune: expected a dataset of at least {max(SIZES.values())} users, {setup.name} has fewer")
    tuned = []
    tables = random_tables(sequences, settings, device)
    with progress_bar("tune", len(SIZES) * len(settings.op_names), "ops") as advance, on(device):
        for size, users in SIZES.items():
            for case in make_cases(sequences, users, tables, settings, device):
                for kernel, call in tunable(case):
                    advance(0, f"{kernel}, {size}")
                    tuned.append(tune_kernel(kernel, size, call, device))
                    log.info("%s, %s: %s", kernel, size, literal(tuned[-1].best))
                advance(1)
    return tuned


def tunable(case: OpCase) -> Iterator[tuple[str, Run]]:
    """Yield every kernel of an op with the shortest pass that launches it: forward, or forward and backward."""
    run = case.forms["triton"].make()
    seen: set[str] = set()
    for direction in ("forward", "both"):
        if direction in case.costs:
            call = timed_call(case, run, direction)
            for kernel in launched(call):
                if kernel in CONFIGURATIONS and kernel not in seen:
                    seen.add(kernel)
                    yield kernel, call


def launched(call: Run) -> list[str]:
    """Return the names of the kernels that a call launches."""
    before = launches.copy()
    call()
    return list(launches - before)


def tune_kernel(kernel: str, size: str, call: Run, device: torch.device) -> TunedKernel:
    """Return the fastest configuration of a kernel whose results agree with the shipped one's.

    Raises InputError if the shipped configuration fails.
    """
    name = architecture(device)
    shipped = table_entry(kernel, name, size)
    expected = comparable(call())

    def time_of(candidate: Configuration) -> float:
        with configured(kernel, name, size, candidate):
            if not agree(comparable(call()), expected):
                raise ValueError("another result")
            return cuda_graph_ms(call)

    try:
        return search(kernel, size, shipped, time_of)
    except RuntimeError as error:
        raise InputError(f"{kernel}, {size}: the shipped configuration fails: {str(error).splitlines()[0]}") from error


def search(kernel: str, size: str, shipped: Configuration, time_of: Callable[[Configuration], float]) -> TunedKernel:
    """Climb from the shipped configuration to its best neighbour until none is faster by more than GAIN.

    `time_of` returns milliseconds; a candidate for which it raises is skipped. Raises RuntimeError if it raises for the
    shipped configuration.
    """
    times: dict[str, float | None] = {}

    def timed(candidate: Configuration) -> float | None:
        key = literal(candidate)
        if key not in times:
            try:
                times[key] = time_of(candidate)
            except Exception:  # compilers and launchers raise many kinds
                times[key] = None
        return times[key]

    try:
        best_ms = shipped_ms = time_of(shipped)
    except Exception as error:  # of as many kinds; without the shipped one there is nothing to compare with
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    times[literal(shipped)] = shipped_ms
    best = shipped
    while True:
        ran = [(ms, candidate) for candidate in neighbours(best) if (ms := timed(candidate)) is not None]
        ms, candidate = min(ran, key=lambda pair: pair[0], default=(best_ms, best))
        if ms >= best_ms * (1 - GAIN):
            skipped = sum(ms is None for ms in times.values())
            return TunedKernel(kernel, size, best, best_ms, shipped_ms, len(times), skipped)
        best_ms = ms
        best = candidate


def neighbours(configuration: Configuration) -> Iterator[Configuration]:
    """Yield configurations one step up or down each ladder, and with both tile sides moved together."""
    values = {**configuration.blocks, "warps": configuration.warps, "stages": configuration.stages}
    moves = [(name,) for name in values]
    if {"BM", "BN"} <= values.keys():
        moves.append(("BM", "BN"))
    for names in moves:
        for up in (False, True):
            moved = {name: _next(LADDERS.get(name, ()), values[name], up) for name in names}
            if None not in moved.values():
                changed = values | moved
                warps, stages = changed.pop("warps"), changed.pop("stages")
                yield Configuration(changed, warps, stages)


@contextmanager
def configured(kernel: str, architecture: str, size: str, chosen: Configuration) -> Iterator[None]:
    """Change the table's entry for a kernel, an architecture and a size within a context."""
    entries = CONFIGURATIONS[kernel]
    key = (architecture, size)
    shipped = entries.get(key)
    entries[key] = chosen
    try:
        yield
    finally:
        if shipped is None:
            del entries[key]
        else:
            entries[key] = shipped


def architecture(device: torch.device) -> str:
    """Return the device's name in the table, such as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def comparable(results: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in fp32 that can be subtracted: the infinite rank of an unreachable target becomes 0."""
    return [torch.nan_to_num(value.detach().float(), nan=float("nan"), posinf=0) for value in results]


def agree(results: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Return True if every tensor lies within TOLERANCE of the expected one's norm; NaN never does."""
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in zip(results, expected))


def cuda_graph_ms(call: Run) -> float:
    """Return the median milliseconds of a call within a CUDA graph, the host's launches left out."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=20, return_mode="median")


def literal(configuration: Configuration) -> str:
    """Return the configuration as the table writes it."""
    blocks = json.dumps(configuration.blocks)
    return f"Configuration({blocks}, warps={configuration.warps}, stages={configuration.stages})"


def as_json(tuned: list[TunedKernel], device: torch.device) -> list[dict[str, Any]]:
    """Return the searches' results as JSON values."""
    name = architecture(device)
    entries = []
    for kernel in tuned:
        place = {"kernel": kernel.kernel, "architecture": name, "size": kernel.size, "entry": literal(kernel.best)}
        times = {"ms": kernel.ms, "shipped_ms": kernel.shipped_ms}
        entries.append({**place, **times, "tried": kernel.tried, "skipped": kernel.skipped})
    return entries


def _next(ladder: tuple[int, ...], value: int, up: bool) -> int | None:
    """Return the next value up or down a ladder of values, or None at its end."""
    steps = [step for step in ladder if (step > value if up else step < value)]
    return (min(steps) if up else max(steps)) if steps else None
