"""Memory of one step on a CPU, kept for the steps after it: new pages cost more than what is done with them."""

from __future__ import annotations

import threading
from typing import ClassVar

import torch
from torch import Tensor

LOCK = threading.Lock()  # for taking; what ends may do so at any moment, and only appends
ALIGNMENT = 64  # bytes of a cache line
MOST_FREE = 32  # blocks


class Memory:
    """What a step's tensors lie in; given back when the object ends."""

    free: ClassVar[list[Tensor]] = []  # blocks of bytes

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory that begins with a cache line, to be used no longer than this object lives."""
        size = torch.Size(shape).numel() * dtype.itemsize
        needed = size + ALIGNMENT
        with LOCK:
            del self.free[:-MOST_FREE]
            fitting = [i for i, block in enumerate(self.free) if needed <= len(block) <= 2 * needed]
            block = self.free.pop(min(fitting, key=lambda i: len(self.free[i]))) if fitting else None
        if block is None:
            block = torch.empty(needed + size // 8, dtype=torch.uint8)  # the next batch may be a little larger
        self.blocks.append(block)
        skip = -block.data_ptr() % ALIGNMENT
        return block[skip : skip + size].view(dtype).view(shape)

    def __del__(self) -> None:
        self.free.extend(self.blocks)
