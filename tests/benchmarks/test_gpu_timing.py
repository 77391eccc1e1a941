"""The kernels' benchmark times the replays of a graph on a GPU, or eager launches, and says why."""

from __future__ import annotations

import pytest
import torch

from iisan_fast.benchmarks import gpu_timing, op_rows
from iisan_fast.benchmarks.gpu_timing import EAGER, GRAPH, WALL_CLOCK, device_timing
from iisan_fast.benchmarks.graph_nodes import captured_nodes
from iisan_fast.benchmarks.op_cases import OpCase

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def timed_calls(monkeypatch) -> list:
    """Collect what is timed, instead of timing it."""
    calls = []
    monkeypatch.setattr(gpu_timing, "event_quantiles", lambda call: calls.append(call) or [1.0, 2.0, 3.0])
    return calls


def test_the_replays_of_a_graph_are_timed_not_the_call(timed_calls, monkeypatch):
    def call():
        pass

    def replay():
        pass

    monkeypatch.setattr(gpu_timing, "captured", {call: replay}.get)
    assert device_timing(call) == ([1.0, 2.0, 3.0], GRAPH) and timed_calls == [replay]


def test_a_call_that_no_graph_takes_is_timed_eagerly_and_says_why(timed_calls, monkeypatch):
    def refuse(call):
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    def call():
        pass

    monkeypatch.setattr(gpu_timing, "captured", refuse)
    timing = device_timing(call)
    assert timed_calls == [call]
    assert timing.timed == EAGER + "RuntimeError: called a synchronizing CUDA operation"


def test_a_row_says_how_it_was_timed(monkeypatch):
    monkeypatch.setattr(op_rows, "CPU_SECONDS", 0.01)
    ones = torch.ones(3)
    case = OpCase("op", ones.dtype, {}, {}, {})
    assert op_rows.measure(case, lambda: [ones.sum()], "forward", torch.device("cpu"))["timed"] == WALL_CLOCK


@pytest.mark.gpu
@needs_cuda
def test_a_graph_is_captured_and_replays_the_call():
    total = torch.zeros(1, device=CUDA)
    with gpu_timing.on_capture_stream(CUDA):
        replay = gpu_timing.captured(lambda: total.add_(1))
        replay()
        replay()
    assert total.item() == 3  # the call that looks for synchronisation counts; the capture itself runs nothing


@pytest.mark.gpu
@needs_cuda
def test_gradients_of_a_forward_pass_on_the_capture_stream_are_captured():
    weight = torch.ones(1000, device=CUDA, requires_grad=True)
    with gpu_timing.on_capture_stream(CUDA):
        output = (weight * 2).sum()
        timing = device_timing(lambda: torch.autograd.grad(output, weight, retain_graph=True))
    assert timing.timed == GRAPH and 0 < timing.quantiles[0] <= timing.quantiles[2]


@pytest.mark.gpu
@needs_cuda
def test_a_call_that_waits_for_the_device_is_timed_eagerly():
    value = torch.ones(1, device=CUDA)
    with gpu_timing.on_capture_stream(CUDA):
        timing = device_timing(value.item)
        assert timing.timed.startswith(EAGER + "RuntimeError: ")
        assert device_timing(lambda: value + 1).timed == GRAPH  # and the next one is captured again


@pytest.mark.gpu
@needs_cuda
def test_a_captured_graph_has_a_node_for_each_launch():
    device = torch.device("cuda", torch.cuda.current_device())
    x, y = (torch.zeros(8, device=device) for _ in range(2))

    def run() -> None:
        torch.add(x, 1, out=y)
        y.mul_(2)
        x.copy_(y)

    run()
    nodes = captured_nodes(run, device)
    assert nodes["kernel"] == 2 and nodes.total() == 3
