"""Rows of the kernels' benchmark: time, launches, memory and gradient error of each form and pass of a case."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exact_gradients import gradient_error
from .floors import device_rates
from .gpu_timing import WALL_CLOCK, Timing, device_timing, on_capture_stream
from .machine import count_launches
from .op_cases import OpCase, Run
from .tables import QUANTILES, quantile_keys

MEASURED = "measured"
WARM_UP_CALLS = 3
CPU_SECONDS = 0.2  # of a row, and at least three calls
REASON_LENGTH = 200  # characters of why a form failed


def measure_case(case: OpCase, device: torch.device, exact: bool) -> list[dict[str, Any]]:
    """Return a row for every form and pass. exact: measure the gradients' error against fp64, too."""
    truth = functools.cache(case.exact) if exact and case.exact else None
    measured = []
    for name, form in case.forms.items():
        unable = form.unable(device)
        for passes, graphs_kept in ((("forward", "both"), False), (("backward",), True)):
            make = functools.cache(form.make)
            with _fresh_compiler(graphs_kept) if form.compiled and not unable else nullcontext():
                for direction in passes:
                    if direction in case.costs:
                        row = blank_row(case, name, direction, device)
                        measured.append(fill(row, case, unable, make, device, truth))
    return measured


def blank_row(case: OpCase, form: str, direction: str, device: torch.device) -> dict[str, Any]:
    """Return a row without figures; figures that are not measured stay None."""
    rates = device_rates(device)
    has_floor = rates is not None and case.dtype == torch.bfloat16
    return {
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        **case.sizes,
        "form": form,
        "pass": direction,
        "status": MEASURED,
        **dict.fromkeys((*quantile_keys("ms"), "timed", "launches", "peak_bytes", "gradient_error")),
        "floor_ms": case.costs[direction].floor_ms(rates) if has_floor else None,
        "floor_share": None,
    }


def fill(
    row: dict[str, Any],
    case: OpCase,
    unable: str,
    make: Callable[[], Run],
    device: torch.device,
    truth: Callable[[], list[Tensor]] | None,
) -> dict[str, Any]:
    """Return the row with its figures, or with the reason why it has none."""
    if unable:
        return row | {"status": unable}
    try:
        row |= measure(case, make(), row["pass"], device, truth)
        if row["floor_ms"]:
            row["floor_share"] = row["floor_ms"] / row["p50_ms"]
    except Exception as error:  # a failure is a result too, whatever another library raises
        row["status"] = f"failed: {_reason(error)}"
    if device.type == "cuda":  # the next row begins with as much memory
        gc.collect()
        torch.cuda.empty_cache()
    return row


def measure(
    case: OpCase, run: Run, direction: str, device: torch.device, truth: Callable[[], list[Tensor]] | None = None
) -> dict[str, Any]:
    """Measure one pass of one form: time and gradient error; on a GPU launches and memory, too."""
    on_gpu = device.type == "cuda"
    figures = {}
    with on_capture_stream(device) if on_gpu else nullcontext():
        call = timed_call(case, run, direction)
        if on_gpu:
            for _ in range(WARM_UP_CALLS):
                call()
            figures["peak_bytes"] = peak_bytes(call, device)
            figures["launches"] = count_launches(call)
            timing = device_timing(call)
        else:
            timing = Timing(cpu_quantiles(call), WALL_CLOCK)
        figures |= {**dict(zip(quantile_keys("ms"), timing.quantiles)), "timed": timing.timed}
        if direction == "both" and truth is not None:
            figures["gradient_error"] = gradient_error(call(), truth)
    return figures


def timed_call(case: OpCase, run: Run, direction: str) -> Run:
    """Return the call that is timed for a pass.

    forward: the forward pass; both: gradients from the inputs on; backward: gradients of one forward pass.
    """
    if direction == "forward":
        return run
    if direction == "both":
        return lambda: torch.autograd.grad(run(), case.leaves, case.upstream)
    outputs = run()
    return lambda: torch.autograd.grad(outputs, case.leaves, case.upstream, retain_graph=True)


def cpu_quantiles(call: Run) -> list[float]:
    """Return p20, p50 and p80 of a call by the wall clock in milliseconds, after one call to warm up."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < CPU_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return [1000 * float(value) for value in np.quantile(times, QUANTILES)]


def peak_bytes(call: Run, device: torch.device) -> int:
    """Return the most bytes that a call allocates on the GPU, its results included."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    del results
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _fresh_compiler(graphs_kept: bool) -> Iterator[None]:
    """Forget compiled functions. Graphs that run backward twice must not lend their memory to the first pass."""
    from torch._functorch import config

    torch.compiler.reset()
    with config.patch(donated_buffer=config.donated_buffer and not graphs_kept):
        yield


def _reason(error: Exception) -> str:
    """Return an error's type and first line, shortened, for the row of a form that failed."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:REASON_LENGTH]
