"""The gradient of the item vectors in a training step on a CPU: what the loss and the sequence encoder give them."""

from __future__ import annotations

from .inbatch_cross_entropy import InbatchCrossEntropyCalls
from .step_calls import Output, StepCalls, addresses
from .structs import RowsStruct


class ItemVectorGradientCalls:
    """The calls that collect the gradient of each item vector."""

    def __init__(self, calls: StepCalls, loss: InbatchCrossEntropyCalls, of_inputs: Output) -> None:
        self._calls, self._loss, self._of_inputs = calls, loss, of_inputs
        self.of_vectors = Output(loss.of_vectors[0])
        self._rows = RowsStruct(width=self.of_vectors.tensor.shape[1])
        self._rows.vectors, self._rows.x = addresses([self.of_vectors.tensor, of_inputs.tensor])

    def backward(self) -> None:
        """Add up what the loss's workers give each item, and what each row gives its own item."""
        batch, rows = self._calls.batch, self._rows
        rows.rows, rows.items, rows.inputs = len(batch.inputs), len(batch.distinct), batch.inputs.data_ptr()
        parts = addresses(self._loss.of_vectors[: self._loss.workers])
        summed = self._calls.add_sums(parts, rows.items * rows.width, self._loss.of_states.done)
        self.of_vectors.done = self._calls.add("add_rows", [rows], summed.to(self._of_inputs.done))
