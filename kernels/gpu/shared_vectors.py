"""Share a step's item vectors between ranks: from the blocks of all ranks to the columns of the loss, and back.

Rank r of N encodes the distinct items r, r + N, r + 2 N and so on. So all ranks encode equally many of a batch, while
the blocks that they exchange have the fixed size E of the run's bound, and a CUDA graph can capture the exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import StepShape


class SharedVectors:
    """The item vectors of all ranks and their gradients, in both orders.

    Attributes: gathered fp32 [N E, d], the blocks of all ranks one after the other, for the exchange to write; vectors
    fp32 [V, d], by column; vector_operands [V, d], vectors in the products' dtype (the same tensor if that is fp32);
    of_vectors fp32 [V, d], their gradient, for `ItemVectorGradients` to write; of_gathered fp32 [N E, d], the same in
    the order of `gathered`; of_block fp32 [E, d], the sum of this rank's block, for the exchange to write.
    """

    def __init__(self, block: Tensor, shape: StepShape, dtype: torch.dtype) -> None:
        """Allocate all memory. block: fp32 [E, d], this rank's vectors. dtype: of the matrix products."""
        encoded, d = block.shape
        self._sizes = (shape.ranks, encoded, d)
        whole = block.new_zeros(2, shape.ranks * encoded, d)  # zeros: no kernel writes rows beyond V
        self._whole, self._of_whole = whole
        self.gathered, self.of_gathered = torch.empty_like(whole)
        self.of_block = torch.empty_like(block)
        self.vectors, self.of_vectors = whole[:, : shape.distinct]
        is_fp32 = dtype == torch.float32
        self.vector_operands = self.vectors if is_fp32 else torch.empty_like(self.vectors, dtype=dtype)

    def spread(self) -> None:
        """Copy the vectors of all ranks to their columns; write vectors and vector_operands."""
        ranks, encoded, d = self._sizes
        self._whole.view(encoded, ranks, d).copy_(self.gathered.view(self._sizes).transpose(0, 1))
        if self.vector_operands is not self.vectors:
            self.vector_operands.copy_(self.vectors)

    def order(self) -> None:
        """Copy the columns' gradients to the places of `gathered`; write of_gathered."""
        ranks, encoded, d = self._sizes
        self.of_gathered.view(self._sizes).copy_(self._of_whole.view(encoded, ranks, d).transpose(0, 1))
