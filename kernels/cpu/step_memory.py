"""Memory of a CPU step that later steps use again, because new pages cost more time than the work on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

LOCK = threading.Lock()  # for taking blocks; blocks return at any moment without it, by an append
KEPT_FOR = 100  # a block that has not been used for so many requests, a few steps, is freed


class Memory:
    """The memory of one step's tensors. When the object is deleted, with the step's graph, its blocks become free."""

    free: ClassVar[list[tuple[int, int, Tensor]]] = []  # (value of `taken` at its return, bytes, block)
    taken: ClassVar[int] = 0  # number of requests so far
    blocks: Sequence[Tensor] = ()

    def __init__(self) -> None:
        """Start without blocks."""
        self.blocks = []

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return an uninitialised tensor that starts at a cache line; it is valid while this object lives."""
        needed = math.prod(shape) * dtype.itemsize
        block = self._fitting(needed)
        if block is None:
            # One eighth more, so that the next batch, if a little larger, can use the block too.
            block = torch.empty(needed + needed // 8, dtype=torch.uint8, device="cpu")
        self.blocks.append(block)
        return block[:needed].view(dtype).view(shape)

    @classmethod
    def _fitting(cls, needed: int) -> Tensor | None:
        """Take the smallest free block of `needed` to 2 * `needed` bytes, or return None; free unused blocks."""
        with LOCK:
            cls.taken += 1
            fitting = [(size, i) for i, (_, size, _) in enumerate(cls.free) if needed <= size <= 2 * needed]
            block = cls.free.pop(min(fitting)[1])[2] if fitting else None
            while cls.free and cls.free[0][0] < cls.taken - KEPT_FOR:
                del cls.free[0]
        return block

    def __del__(self) -> None:
        """Make the blocks free for later steps."""
        self.free.extend((Memory.taken, block.nbytes, block) for block in self.blocks)
