"""The limits of the difference between a form on a GPU and the reference, and checks for every op with such a form.

A result is judged by the eager op's own error in the same precision: both see the same rounded inputs and weights, and
both are compared with the reference in fp64.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from iisan_fast.kernels.gpu.launch import launches

GIB = 1 << 30
TF32_EPS = 2**-10

Results = dict[str, list[Tensor]]  # outputs, and gradients by the names of their tensors


@dataclass(frozen=True)
class Precision:
    """The dtype of inputs and weights, and how fp32 matrices are multiplied."""

    dtype: torch.dtype
    matmul: str = "highest"

    @property
    def is_tf32(self) -> bool:
        return self.matmul == "high"

    @contextmanager
    def active(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, "high"),
    "fp16": Precision(torch.float16),
    "bf16": Precision(torch.bfloat16),
}
each_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Make torch.empty return NaN (and the largest integers), so that numbers that a kernel does not write show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # warn only: cuBLAS may not be deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return ||result - exact|| / ||exact|| over all tensors together; NaN if a result has one."""
    difference = sum((a.detach().double() - b.detach().double()).square().sum().item() for a, b in zip(results, exact))
    scale = sum(b.detach().double().square().sum().item() for b in exact)
    return (difference / scale) ** 0.5 if scale else difference**0.5


def assert_as_good(ours: Results, theirs: Results, exact: Results, precision: Precision, measured: bool = True) -> None:
    """Check that errors are at most twice the eager op's, or 4 ulp of the dtype where that is larger.

    A few numbers (gates, losses of a row or two) do not average an error, so they may err as much as eager does on the
    worst of the others. In TF32 eager is a measure only where cuBLAS surely multiplies in TF32 (`measured`); elsewhere
    4 ulp of TF32 are allowed.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    eager = {name: relative_error(theirs[name], truth) for name, truth in exact.items()}
    is_large = {name: sum(value.numel() for value in truth) >= 1000 for name, truth in exact.items()}
    worst = max((eager[name] for name in exact if is_large[name]), default=0.0)
    floor = 4 * (torch.finfo(precision.dtype).eps if measured or not precision.is_tf32 else TF32_EPS)
    lines = []
    are_good = True
    for name, truth in exact.items():
        assert [value.shape for value in ours[name]] == [value.shape for value in truth], name
        error = relative_error(ours[name], truth)
        allowed = max(2 * (eager[name] if is_large[name] else max(eager[name], worst)), floor)
        are_good &= error <= allowed
        lines.append(f"{name}: error {error:.2e}, eager {eager[name]:.2e}, allowed {allowed:.2e}")
    assert are_good, "\n" + "\n".join(lines)


def assert_close(results: Results, expected: Results, rtol: float) -> None:
    """Check that each tensor differs from the expected one by at most `rtol`, by norms."""
    assert results.keys() == expected.keys()
    errors = {name: relative_error(results[name], expected[name]) for name in expected}
    assert all(error <= rtol for error in errors.values()), errors


def assert_same(results: Results, expected: Results, context: str = "") -> None:
    """Check that results are equal bit for bit."""
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        for i, (result, value) in enumerate(zip(results[name], values, strict=True)):
            assert torch.equal(result, value), f"{name}[{i}] differs{context}"


@contextmanager
def all_launched(expected: set[str]) -> Iterator[None]:
    """Check that exactly these kernels were launched, each at least once."""
    launches.clear()
    yield
    assert set(launches) == expected


def needs_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, found {free / GIB:.0f}")


def extra_memory(function: Callable[[], Any]) -> int:
    """Return the peak of bytes that a call allocates; a call before it allocates the workspaces."""
    function()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def check_repeats(make: Callable[[int], Any], run: Callable[[Any], Results], times: int) -> None:
    """Check that an op gives equal bits on equal inputs, with other contents of the memory before each call."""
    inputs = make(0)
    first = run(inputs)
    device = inputs.tensors()[0].device
    for i in range(1, times):
        torch.full((1 << 22,), float("nan") if i % 2 else 1e30, device=device)  # the contents of the next call's memory
        assert_same(run(inputs), first, f" in run {i}")


def check_captured_graph(make: Callable[[int], Any], run: Callable[[Any], Results], dtype: torch.dtype) -> None:
    """Capture an op in a CUDA graph, and replay it on inputs from other seeds."""
    inputs = make(0)
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            run(inputs)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(inputs)
    for seed in (1, 2):
        fresh = make(seed)
        for captured, value in zip(inputs.tensors(), fresh.tensors(), strict=True):
            captured.copy_(value)
        graph.replay()
        assert_close(replayed, run(fresh), rtol=4 * torch.finfo(dtype).eps)


def compiled(op: Callable, compiler: str = "inductor") -> Callable:
    """Return an op compiled as one graph."""
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend=compiler)


def compiled_tolerance(dtype: torch.dtype) -> float:
    """Return how far a compiled op's results may be from the op's."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


class OpRecorder(TorchDispatchMode):
    """A dispatch mode that records the calls of this project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "iisan_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registrations(run: Callable[[], Results], name: str) -> None:
    """Pass every operator that a run calls, `name` among them, to torch.library.opcheck with the same arguments."""

    def copy(needs_gradients: bool) -> Callable[[Any], Any]:
        return lambda value: (
            value.detach().clone().requires_grad_(needs_gradients and value.requires_grad)
            if isinstance(value, Tensor)
            else value
        )

    with OpRecorder() as recorder:
        run()
    names = [func.name().removeprefix("iisan_fast::") for func, _ in recorder.calls]
    assert name in names
    for name, (func, arguments) in zip(names, recorder.calls):
        torch.library.opcheck(func, tree_map(copy(not name.endswith("_backward")), arguments))
