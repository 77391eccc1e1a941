"""Memory of a step on a CPU, used again by the steps after it: new pages cost more than the work on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

LOCK = threading.Lock()  # for taking; blocks come back at any moment, and are only appended
KEPT_FOR = 100  # takings, a few steps: then a block that nobody took is freed


class Memory:
    """The memory of a step's tensors. It comes back when the object ends, which is when the step's graph ends."""

    free: ClassVar[list[tuple[int, int, Tensor]]] = []  # how many had been taken when it came back, bytes, the block
    taken: ClassVar[int] = 0
    blocks: Sequence[Tensor] = ()

    def __init__(self) -> None:
        self.blocks = []

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return memory that begins with a cache line, to be used no longer than this object lives."""
        needed = math.prod(shape) * dtype.itemsize
        block = self._fitting(needed)
        if block is None:
            # The next batch may be a little larger.
            block = torch.empty(needed + needed // 8, dtype=torch.uint8, device="cpu")
        self.blocks.append(block)
        return block[:needed].view(dtype).view(shape)

    @classmethod
    def _fitting(cls, needed: int) -> Tensor | None:
        """Take the smallest free block that is large enough, and not much larger; drop blocks unused for long."""
        with LOCK:
            cls.taken += 1
            fitting = [(size, i) for i, (_, size, _) in enumerate(cls.free) if needed <= size <= 2 * needed]
            block = cls.free.pop(min(fitting)[1])[2] if fitting else None
            while cls.free and cls.free[0][0] < cls.taken - KEPT_FOR:
                del cls.free[0]
        return block

    def __del__(self) -> None:
        self.free.extend((Memory.taken, block.nbytes, block) for block in self.blocks)
