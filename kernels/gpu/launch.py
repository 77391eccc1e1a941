"""Launch Triton kernels and count the launches; helpers that round tile sizes and scale gradients for kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configurations import Configuration

launches: Counter[str] = Counter()  # kernel name -> launches since the start of the process or the last clear()
_recorders: list[Callable[[Launch], None]] = []


class Launch(NamedTuple):
    """One launch of a Triton kernel; it suffices to compile the kernel exactly as it would run."""

    kernel: Any  # the @triton.jit function
    name: str  # its name in `CONFIGURATIONS` and `launches`
    grid: tuple[int, ...]
    configuration: Configuration
    arguments: tuple[Any, ...]  # tensors and numbers
    meta: dict[str, Any]  # constexpr arguments by name


@contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block, call `record` with each launch instead of running it; meta tensors suffice as arguments."""
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.pop()


def launch(kernel: Any, name: str, grid: tuple[int, ...], chosen: Configuration, *arguments: Any, **meta: Any) -> None:
    """Launch a Triton kernel and count the launch under its name; an empty grid launches nothing.

    Args: kernel: the @triton.jit function; grid: its programs; chosen: warps and stages; arguments: tensors and numbers
    in the kernel's order; meta: its constexpr arguments, tile sizes included.
    """
    if 0 in grid:
        return
    launches[name] += 1
    if _recorders:
        _recorders[-1](Launch(kernel, name, grid, chosen, arguments, meta))
        return
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[grid](*arguments, **meta, num_warps=chosen.warps, num_stages=chosen.stages)


def block(size: int, most: int = 64) -> int:
    """Return the tile size for `size` columns: the next power of two, at least 16 (as tl.dot needs), at most `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def fit_range(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return (gradient * factor, factor) with 1 as the largest absolute element, so that fp16 does not underflow.

    For other dtypes and empty gradients return (gradient, None).
    """
    if dtype != torch.float16 or not gradient.numel():
        return gradient, None
    largest = gradient.abs().amax().float()
    factor = torch.where(largest > 0, 1 / largest, torch.ones_like(largest))
    return gradient * factor, factor


def precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input precision: "tf32" for fp32 unless torch's matmul precision is "highest", else "ieee"."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
