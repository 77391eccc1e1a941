"""A step as a CUDA graph: captured once, then replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before a capture: kernels are compiled, libraries make their workspaces

Result = TypeVar("Result")


def capture_in_a_graph(run: Callable[[], Result], record: Tensor) -> Callable[[], Result]:
    """Capture a function in a CUDA graph and return what replays it; the result is overwritten by the next replay.

    record: the step's, with the failure flag in its third place. Calls that warm the function up find the flag set, so
    that they update nothing.
    """
    before = record.clone()
    record[2] = 1
    with torch.cuda.device(record.device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # so it is, but for these calls
            for _ in range(WARM_UP_CALLS):
                run()
        current.wait_stream(stream)
        record.copy_(before)
        graph = torch.cuda.CUDAGraph()
        # The thread that prepares batches may pin memory meanwhile, which breaks a capture in the default mode.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()

    def replay() -> Result:
        graph.replay()
        return result

    return replay
