"""Write a batch's loss and add it to the record of a run's losses, on a CPU in C++ (`cpp/loss_record.cpp`)."""

from __future__ import annotations

from ..types import StepTensors
from .step_calls import Output, StepCalls, addresses
from .structs import RecordStruct


class LossRecordCalls:
    """The call that writes a batch's loss and counts the step.

    After the first loss that is not finite, no loss is added to the record and `steps` does not grow. On several ranks
    the call writes `loss_share` alone.
    """

    def __init__(self, calls: StepCalls, losses: Output, tensors: StepTensors) -> None:
        """Prepare the call. losses: the loss of each row [rows]. tensors: with record, loss, steps and loss_share."""
        self._calls = calls
        self._losses = losses
        self._struct = RecordStruct()
        self._struct.row_losses, self._struct.loss = addresses([losses.tensor, tensors.loss])
        self._struct.sums, self._struct.steps = addresses([tensors.record, tensors.adam.steps])
        if tensors.loss_share is not None:
            self._struct.share = tensors.loss_share.data_ptr()

    def forward(self) -> None:
        """Schedule the call for the current batch."""
        batch = self._calls.batch
        self._struct.rows = len(batch.targets)
        self._struct.step = batch.step
        self._struct.row_weights = batch.row_weights.data_ptr()
        self._calls.add("record_loss", [self._struct], self._losses.done)
