"""Times on a GPU: replays of a CUDA graph between events, so that the host's launches do not count.

An op of many small kernels, launched one by one, would be timed by the host's speed. If no graph can be captured, eager
launches are timed, and the result says so and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .tables import QUANTILES

WARM_UP_MS, MEASURED_MS = 25, 200  # of one call
REASON_LENGTH = 120  # characters
WALL_CLOCK = "calls by the wall clock"
GRAPH = "replays of a CUDA graph by events, the L2 cache overwritten before each"
EAGER = "eager calls by events, the host's launches included, the L2 cache overwritten before each; no graph: "


class Timing(NamedTuple):
    """The time of a call, and how it was measured."""

    quantiles: list[float]  # p20, p50 and p80, in milliseconds
    timed: str  # how


def device_timing(call: Callable[[], Any]) -> Timing:
    """Time a call that has been called before, on the current stream, which must not be the default stream."""
    try:
        replay = captured(call)
    except Exception as error:  # whatever a library raises where it waits for the device or allocates by itself
        lines = str(error).strip().splitlines() or [""]
        return Timing(event_quantiles(call), EAGER + f"{type(error).__name__}: {lines[0]}"[:REASON_LENGTH])
    return Timing(event_quantiles(replay), GRAPH)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture a call in a CUDA graph and return what replays it. Raises what keeps the call from being captured."""
    with synchronisation_refused():  # a capture that fails half-way would leave the allocator in it
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


@contextmanager
def synchronisation_refused() -> Iterator[None]:
    """Let an operation that waits for the device raise RuntimeError."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run what is inside on a stream that can be captured, after all that was launched before.

    A backward pass runs on the stream of its forward pass, so the forward pass has to be in here too.
    """
    stream = _stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def event_quantiles(call: Callable[[], Any]) -> list[float]:
    """Return p20, p50 and p80 of a call in milliseconds between two events, the L2 cache overwritten before each.

    Overwriting the cache takes longer than launching one graph, so a replay never waits for the host.
    """
    from triton.testing import do_bench

    return do_bench(call, warmup=WARM_UP_MS, rep=MEASURED_MS, quantiles=list(QUANTILES))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return a new CUDA stream of the device, on which graphs are captured."""
    return torch.cuda.Stream(device)
