"""Write a batch's loss and add it to the record of a run's losses, on a CPU in C++ (`cpp/loss_record.cpp`)."""

from __future__ import annotations

from torch import Tensor

from .step_calls import Output, StepCalls, addresses
from .structs import RecordStruct


class LossRecordCalls:
    """The call that writes a batch's loss and counts the step.

    After the first loss that is not finite, no loss is added to the record and `steps` does not grow.
    """

    def __init__(self, calls: StepCalls, losses: Output, record: Tensor, loss: Tensor, steps: Tensor) -> None:
        """Prepare the call.

        Args:
            calls: the step's schedule and batch.
            losses: the loss of each row [rows].
            record: float64 [4]: sum of row losses; number of rows; 1 + the first failed step, or 0; the loss there.
            loss: scalar, the batch's loss: the sum of losses times row_weights.
            steps: fp32 scalar, Adam's number of steps.
        """
        self._calls = calls
        self._losses = losses
        self._struct = RecordStruct()
        self._struct.row_losses, self._struct.loss = addresses([losses.tensor, loss])
        self._struct.sums, self._struct.steps = addresses([record, steps])

    def forward(self) -> None:
        """Schedule the call for the current batch."""
        batch = self._calls.batch
        self._struct.rows = len(batch.targets)
        self._struct.step = batch.step
        self._struct.row_weights = batch.row_weights.data_ptr()
        self._calls.add("record_loss", [self._struct], self._losses.done)
