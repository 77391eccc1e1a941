"""Count a step's loss in the record of a run's steps."""

from __future__ import annotations

import torch
from torch import Tensor


def add_loss(record: Tensor, loss: Tensor, rows: Tensor, step: int | Tensor) -> None:
    """Add the loss of a step, the mean over its rows, to a record. After a loss that is not finite nothing is added.

    record: float64 [4] with the sum of row losses, the rows, 1 + the first failed step (0 for none) and its loss. loss,
    rows: scalars. step: number of the step in the run, from 0. Nothing waits for a device.
    """
    value = loss.double()
    finite = value.isfinite()
    addends = [torch.where(finite, value, 0) * rows, rows * finite]
    addends += [(step + 1) * ~finite, torch.where(finite, 0, value)]
    record += torch.where(record[2] == 0, torch.stack(addends), 0)
