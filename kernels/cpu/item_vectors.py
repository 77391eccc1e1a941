"""Add up the gradients that the loss and the sequence encoder give to the item vectors, in a CPU step."""

from __future__ import annotations

from .inbatch_cross_entropy import InbatchCrossEntropyCalls
from .step_calls import Output, StepCalls, addresses
from .structs import RowsStruct


class ItemVectorGradientCalls:
    """The calls that compute `of_vectors` [items, d], the whole gradient of the item vectors."""

    def __init__(self, calls: StepCalls, loss: InbatchCrossEntropyCalls, of_inputs: Output) -> None:
        """Prepare the calls; of_inputs [rows, d]: the gradient of the item vector that each row reads."""
        self._calls = calls
        self._loss = loss
        self._of_inputs = of_inputs
        self.of_vectors = Output(loss.of_vectors[0])
        self._rows = RowsStruct(width=self.of_vectors.tensor.shape[1])
        self._rows.vectors, self._rows.x = addresses([self.of_vectors.tensor, of_inputs.tensor])

    def backward(self) -> None:
        """Schedule the sum of the loss workers' parts, and then the addition of each row's gradient to its item."""
        batch = self._calls.batch
        rows = self._rows
        rows.rows = len(batch.inputs)
        rows.items = len(batch.distinct)
        rows.inputs = batch.inputs.data_ptr()
        parts = addresses(self._loss.of_vectors[: self._loss.workers])
        summed = self._calls.add_sums(parts, rows.items * rows.width, self._loss.of_states.done)
        self.of_vectors.done = self._calls.add("add_rows", [rows], summed.to(self._of_inputs.done))
