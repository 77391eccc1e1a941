"""Exchange the tensors of a step on a GPU between ranks: buffers of fixed size and address, as a CUDA graph needs them.

A batch has fewer items than the run's bound, but the sizes in a graph do not change, so the bound is exchanged. In
return the host takes part in no exchange: the whole step is one replay.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels import RankSeam
from ..ranks import Ranks


class CapturedExchanges:
    """The three exchanges of a step on several ranks. Every rank calls each of them once a step, in their order."""

    def __init__(self, ranks: Ranks, seam: RankSeam, summed: Tensor) -> None:
        """Store the tensors. summed: the gradients of all weights, then this rank's part of the loss."""
        self._ranks = ranks
        self._seam = seam
        self._summed = summed

    def gather_vectors(self) -> None:
        """Write the item vectors of all ranks to their columns."""
        self._ranks.gather_into(self._seam.gathered, self._seam.block_vectors)
        self._seam.spread()

    def add_vector_gradients(self) -> None:
        """Write the gradients of this rank's item vectors, summed over the ranks."""
        self._seam.order()
        self._ranks.add_into(self._seam.of_block_vectors, self._seam.of_gathered)

    def add_gradients(self) -> None:
        """Add up the gradients of all weights over the ranks, and count the step with the loss of the whole batch."""
        self._ranks.add_up(self._summed)
        self._seam.count()
