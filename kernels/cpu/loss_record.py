"""A step's loss and the record of the steps before it on a CPU by C++ (`cpp/loss_record.cpp`)."""

from __future__ import annotations

from torch import Tensor

from .step_calls import Output, StepCalls, addresses
from .structs import RecordStruct


class LossRecordCalls:
    """The call that notes a batch's loss.

    record float64 [4]: the sum of losses over rows, rows, the first failed step counted from 1 or 0, its loss. From the
    first loss on that is not finite nothing counts, and `steps`, fp32, Adam's number of steps, stays.
    """

    def __init__(self, calls: StepCalls, losses: Output, record: Tensor, loss: Tensor, steps: Tensor) -> None:
        self._calls, self._losses, self._struct = calls, losses, RecordStruct()
        self._struct.row_losses, self._struct.loss = addresses([losses.tensor, loss])
        self._struct.sums, self._struct.steps = addresses([record, steps])

    def forward(self) -> None:
        """Write the batch's loss, and count it."""
        batch = self._calls.batch
        self._struct.rows, self._struct.step = len(batch.targets), batch.step
        self._struct.row_weights = batch.row_weights.data_ptr()
        self._calls.add("record_loss", [self._struct], self._losses.done)
