"""Exchange the tensors of a fused step between ranks, in place, at the seams between its stages."""

from __future__ import annotations

from torch import Tensor

from ..kernels import StepSeam, StepTensors
from ..ranks import Ranks
from .flat_storage import FlatStorage
from .step_record import add_loss


class StepExchanges:
    """The three exchanges of a step on several ranks. Every rank calls each of them once a step, in their order.

    For V items of d numbers, ranks gather V d numbers, add up V d numbers of which each rank gets its block, and add up
    all weights' gradients with a rank's part of the loss and its rows.
    """

    def __init__(
        self, ranks: Ranks, item_ranks: Ranks, seam: StepSeam, storage: FlatStorage, tensors: StepTensors
    ) -> None:
        """Store the tensors.

        item_ranks: those that share out a batch's items; ALONE if each rank has all items of its batch. storage: of the
        weights. tensors: of the step, with `loss_share`.
        """
        self._ranks = ranks
        self._item_ranks = item_ranks
        self._seam = seam
        self._storage = storage
        self._tensors = tensors

    def set_batch(self, items: int, encoded: int, step: int | Tensor) -> None:
        """Set the sizes of a batch. items: V. encoded: of this rank's block. step: its number, from 0."""
        self._items = items
        self._encoded = encoded
        self._step = step

    def gather_vectors(self) -> None:
        """Write the item vectors of all ranks."""
        seam = self._seam
        seam.vectors[: self._items] = self._item_ranks.gather_blocks(seam.block_vectors, self._items)

    def add_vector_gradients(self) -> None:
        """Write the gradients of this rank's item vectors, summed over the ranks."""
        seam = self._seam
        block = self._item_ranks.add_blocks(seam.of_vectors[: self._items])
        seam.of_block_vectors[: self._encoded] = block[: self._encoded]

    def add_gradients(self) -> None:
        """Add up the gradients of all weights over the ranks, and count the step with the loss of the whole batch."""
        tensors = self._tensors
        self._ranks.add_up(self._storage.summed)
        loss, rows = self._storage.loss_share
        tensors.loss.copy_(loss)
        add_loss(tensors.record, tensors.loss, rows.double(), self._step)
        tensors.adam.steps.add_(tensors.record[2] == 0)
