"""Add up the gradient of a step's item vectors: from the loss's columns and targets, and the encoder's inputs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import inbatch_cross_entropy_kernels as device
from .configurations import configuration
from .inbatch_cross_entropy import InbatchCrossEntropy
from .launch import launch


class ItemVectorGradients:
    """The op that writes `of_vectors` fp32 [V, d], after the backwards of the loss and of the sequence encoder.

    It sums over the occurrences of each item, which are sorted, without atomics. Beyond the batch's items it is 0.
    """

    def __init__(self, loss: InbatchCrossEntropy, of_inputs: Tensor, of_vectors: Tensor | None = None) -> None:
        """Allocate the output, unless `of_vectors` is given for it.

        of_inputs: fp32 [M, d], the gradient of the item vector that each row reads.
        """
        self._loss = loss
        self._of_inputs = of_inputs
        empty = torch.empty_like(loss.operands.items, dtype=torch.float32)
        self.of_vectors = empty if of_vectors is None else of_vectors

    def backward(self) -> None:
        """Launch the sum; write `of_vectors`."""
        loss = self._loss
        operands = self._loss.operands
        columns, d = operands.items.shape
        rows_of_splits = operands.configuration("loss_item_gradients").blocks
        chosen = configuration(
            "item_vector_gradients", len(operands.queries), operands.queries.dtype, operands.queries.device, d
        )
        launch(
            device.item_vector_gradients,
            "item_vector_gradients",
            (triton.cdiv(columns, chosen.blocks["BV"]),),
            chosen,
            loss.item_parts,
            loss.results.target_weights,
            operands.queries,
            self._of_inputs,
            loss.batch.offsets,
            loss.batch.occurrences,
            operands.header,
            self.of_vectors,
            columns,
            TILE_ROWS=operands.tile_rows,
            BD=d,
            BM=rows_of_splits["BM"],
            BC=loss.item_parts.shape[1],
            PROGRAMS=rows_of_splits["PROGRAMS"],
            **chosen.blocks,
        )
