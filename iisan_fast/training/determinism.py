"""Make torch repeat its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..runtime import fix_cublas_workspace


@contextmanager
def deterministic() -> Iterator[None]:
    """Make torch compute the same bits inside the context, for the same seed and machine.

    Enter it before the first product on CUDA: the cuBLAS variable that it sets is read once, and stays.
    """
    old_settings = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    fix_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no code here reads memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(old_settings[0])
        torch.utils.deterministic.fill_uninitialized_memory = old_settings[1]
