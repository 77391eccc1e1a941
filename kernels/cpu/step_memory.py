"""Memory of one step on a CPU, kept for the steps after it: new pages cost more than what is done with them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

LOCK = threading.Lock()  # for taking; what ends may do so at any moment, and only appends
KEPT_FOR = 100  # takings: some steps


class Memory:
    """What a step's tensors lie in; given back when the object ends, which is when the graph of that step does."""

    free: ClassVar[list[tuple[int, int, Tensor]]] = []  # how many had been taken when it came back, bytes, the block
    taken: ClassVar[int] = 0
    blocks: Sequence[Tensor] = ()

    def __init__(self) -> None:
        self.blocks = []

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory that begins with a cache line, as all of torch's; to be used no longer than this object lives."""
        needed = math.prod(shape) * dtype.itemsize
        block = self._fitting(needed)
        if block is None:
            block = torch.empty(
                needed + needed // 8, dtype=torch.uint8, device="cpu"
            )  # the next batch may be a little larger
        self.blocks.append(block)
        return block[:needed].view(dtype).view(shape)

    @classmethod
    def _fitting(cls, needed: int) -> Tensor | None:
        """The smallest free block that is large enough, and not much larger; what nobody has wanted for long goes."""
        with LOCK:
            cls.taken += 1
            fitting = [(size, i) for i, (_, size, _) in enumerate(cls.free) if needed <= size <= 2 * needed]
            found = cls.free.pop(min(fitting)[1])[2] if fitting else None
            while cls.free and cls.free[0][0] < cls.taken - KEPT_FOR:
                del cls.free[0]
        return found

    def __del__(self) -> None:
        self.free.extend((Memory.taken, block.nbytes, block) for block in self.blocks)
