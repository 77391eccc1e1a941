"""The nodes of a captured CUDA graph, counted by kind."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

# As the driver numbers them: CUgraphNodeType.
KINDS = ("kernel", "copy", "memset", "host call", "graph", "empty", "wait", "event", "signal", "semaphore wait")
KINDS += ("allocation", "free", "batch of memory operations", "conditional")
LAUNCHES = ("kernel", "copy", "memset")  # kinds that count as launches
DRIVER = "libcuda.so.1"


def captured_nodes(run: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Capture a function that was called before, and count the nodes of its graph by kind. Nothing is replayed."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            run()
        return node_kinds(graph.raw_cuda_graph(), ctypes.CDLL(DRIVER))


def node_kinds(graph: int, driver: Any) -> Counter[str]:
    """Count a graph's nodes by kind. Raises RuntimeError where the driver refuses.

    Args: graph: its address; driver: the CUDA driver's library.
    """
    count = ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    if count.value:
        _check(driver.cuGraphGetNodes(ctypes.c_void_p(graph), nodes, ctypes.byref(count)))
    kinds: Counter[str] = Counter()
    for node in nodes:
        kind = ctypes.c_int()
        _check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        kinds[KINDS[kind.value] if kind.value < len(KINDS) else f"kind {kind.value}"] += 1
    return kinds


def _check(code: int) -> None:
    """Raise RuntimeError if the CUDA driver returns an error code."""
    if code:
        raise RuntimeError(f"the CUDA driver refuses to list a graph's nodes: error {code}")
