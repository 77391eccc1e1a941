"""Capture a step as a CUDA graph once, and replay it."""

from __future__ import annotations

import atexit
import warnings
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before a capture, to compile kernels and allocate workspaces
_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

Result = TypeVar("Result")


def capture_in_a_graph(run: Callable[[], Result], record: Tensor) -> Callable[[], Result]:
    """Capture a function in a CUDA graph, and return a function that replays it and returns its result.

    The next replay overwrites the result. record: float64 [4] of the step, whose third entry is the number of the first
    failed step. It is set during the calls that warm the function up, so that these calls update nothing; afterwards
    the record has its old values. The function may exchange data between ranks if all ranks capture and replay it.
    """
    old_record = record.clone()
    record[2] = 1
    with torch.cuda.device(record.device):
        stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # it is capturable, except in these calls
            for _ in range(WARM_UP_CALLS):
                run()
        current.wait_stream(stream)
        record.copy_(old_record)
        graph = torch.cuda.CUDAGraph()
        free_at_exit(graph)
        # In the default mode, another thread that pins memory for batches would break the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def free_at_exit(graph: torch.cuda.CUDAGraph) -> None:
    """Free a graph when the process ends, if it still lives: NCCL, before it ends, waits for all graphs that use it."""
    if not _graphs:
        atexit.register(_free_graphs)  # called before that which ends NCCL, because the ranks have joined before
    _graphs.add(graph)


def _free_graphs() -> None:
    """Free all graphs."""
    for graph in list(_graphs):
        graph.reset()
    _graphs.clear()
