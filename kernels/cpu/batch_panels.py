"""Copy a batch into a CPU step's memory: the items' hidden states in panels of 16 columns, and the loss's constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..threads import shares
from ..types import States
from .library import PANEL
from .schedule import AT_ONCE
from .side_towers import gathers, panels_of
from .step_calls import StepCalls
from .structs import ColumnsStruct


class BatchCalls:
    """The calls that copy a batch into a step's memory.

    Attributes: panels, for each view the hidden states [K, ceil(D / 16), encoded, 16]; log_multiplicity [items];
    column [items], log multiplicity - log popularity; of_row_losses [rows], the gradient of each row's loss.
    """

    def __init__(self, calls: StepCalls, states: Sequence[States]) -> None:
        """Allocate the memory; states: the views of a batch, for their number, shape and dtype."""
        self._calls = calls
        self.done = AT_ONCE
        _, layers, width = states[0].table.shape
        shape = len(states), layers, panels_of(width), calls.encoded, PANEL
        self.panels = torch.empty(shape, dtype=states[0].table.dtype, device="cpu").unbind()
        self.log_multiplicity, self.column = calls.empty(2, calls.items)
        self.of_row_losses = calls.empty(calls.rows)

    def forward(self) -> None:
        """Schedule the gathering of the states, the loss's constants and the gradient of each row's loss."""
        batch = self._calls.batch
        constants = ColumnsStruct(rows=len(batch.targets), items=len(batch.distinct))
        for name in ColumnsStruct.OF_BATCH:
            setattr(constants, name, getattr(batch, name).data_ptr())
        for name in ("log_multiplicity", "column", "of_row_losses"):
            setattr(constants, name, getattr(self, name).data_ptr())
        gathered = self._calls.add("gather_panels", gathers(batch.states, self.panels, shares(batch.encoded)))
        self.done = gathered.to(self._calls.add("loss_columns", [constants]))
