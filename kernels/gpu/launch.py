"""Launch Triton kernels and count the launches; bring sizes and gradients into the form that kernels take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configurations import Configuration

launches: Counter[str] = Counter()  # by kernel, since the process began or the last clear()
_recorders: list[Callable[[Launch], None]] = []


class Launch(NamedTuple):
    """One launch of a Triton kernel, with all that is needed to compile the kernel as it would run."""

    kernel: Any
    name: str
    grid: tuple[int, ...]
    configuration: Configuration
    arguments: tuple[Any, ...]
    meta: dict[str, Any]


@contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Give every launch to `record` and run none of them, so that tensors without values (meta) will do."""
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.pop()


def launch(kernel: Any, name: str, grid: tuple[int, ...], chosen: Configuration, *arguments: Any, **meta: Any) -> None:
    """Run a Triton kernel and count the launch under its name. An empty grid launches nothing."""
    if 0 in grid:
        return
    launches[name] += 1
    if _recorders:
        _recorders[-1](Launch(kernel, name, grid, chosen, arguments, meta))
        return
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[grid](*arguments, **meta, num_warps=chosen.warps, num_stages=chosen.stages)


def block(size: int, most: int = 64) -> int:
    """Return a tile that covers `size` columns, or `most` of them: a power of two of at least 16, as tl.dot needs."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def fit_range(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a gradient that does not underflow in fp16, its largest element brought to 1, and the factor."""
    if dtype != torch.float16 or not gradient.numel():
        return gradient, None
    largest = gradient.abs().amax().float()
    factor = torch.where(largest > 0, 1 / largest, torch.ones_like(largest))
    return gradient * factor, factor


def precision(dtype: torch.dtype) -> str:
    """Return how fp32 matrices are multiplied, as torch.set_float32_matmul_precision says: IEEE or TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
