"""One optimizer step by autograd: loss, gradients, update. Nothing in it waits for the device; on CUDA it is
captured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..data import Batch, Shape
from ..kernels import States
from ..models import Recommender
from ..states import ItemInputs
from .cuda_graphs import capture_in_a_graph
from .optimizer import Adam

SMALL_BATCH_ROWS = 1024  # of a batch, up to which threads cost a CPU's small operators more than they give


class Reading(NamedTuple):
    """The outcome of the steps since the last reading."""

    loss: float  # the sum over rows
    rows: int
    failed_step: int | None  # the first step whose loss was not finite, counted from 1; nothing was updated since
    failed_loss: float

    @classmethod
    def of(cls, record: Tensor) -> Reading:
        """Read a step's record and begin its sums anew: sum of losses, rows, first failed step (0: none), its loss."""
        loss, rows, step, failed_loss = record.tolist()
        record[:2] = 0
        return cls(loss, int(rows), int(step) or None, failed_loss)


class TrainingStep:
    """The model and its optimizer.

    A loss that is not finite sets a flag on the device, with its step, and from then on no update takes place.
    """

    def __init__(self, model: Recommender, rates: Mapping[str, float], device: torch.device) -> None:
        self.model = model
        groups = model.parameter_groups().items()
        self.optimizer = Adam(
            [{"params": parameters, "lr": rates[name]} for name, parameters in groups if parameters], device
        )
        # Sum of losses, rows, first failed step (0: none), its loss.
        self.record = torch.zeros(4, dtype=torch.float64, device=device)

    def __call__(self, batch: Batch, inputs: ItemInputs, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        """Take one step and return the loss before it, a scalar on the device. `mark` is called as each phase ends."""
        small = (
            self.record.is_cpu and len(batch.targets) <= SMALL_BATCH_ROWS and self.model.item_encoder.small_operators
        )
        with kernels.in_large_pieces() if small else nullcontext():
            return self._take(batch, inputs, mark)

    def _take(self, batch: Batch, inputs: ItemInputs, mark: Callable[[str], None]) -> Tensor:
        self.model.zero_grad()
        loss = self.model.loss(batch, inputs)
        mark("forward")
        self._note(loss.detach(), batch)
        loss.backward()
        mark("backward")
        self.optimizer.update()
        mark("update")
        return loss.detach()

    def _note(self, loss: Tensor, batch: Batch) -> None:
        """Add a step's loss to the record. From the first that is not finite on nothing counts or is updated."""
        value, rows = loss.double(), (batch.weights > 0).sum()
        finite = value.isfinite()
        addends = [torch.where(finite, value, 0) * rows, rows * finite]
        addends += [(batch.step + 1) * ~finite, torch.where(finite, 0, value)]
        self.record += torch.where(self.record[2] == 0, torch.stack(addends), 0)
        self.optimizer.found_inf = (self.record[2] > 0).float()  # the fused optimizer leaves everything as it is then

    def read(self) -> Reading:
        """Return the outcome since the last reading. Waits for the device."""
        return Reading.of(self.record)


class CapturedStep:
    """The step as a CUDA graph, captured once: all batches are padded to one shape."""

    def __init__(
        self, step: TrainingStep, capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None
    ) -> None:
        """capture: turns a function without arguments into one that is called at every step; None: a CUDA graph."""
        self.step = step
        self.capture = capture or functools.partial(capture_in_a_graph, record=step.record)
        self._captured: _Captured | None = None

    def __call__(self, batch: Batch, states: list[States]) -> Tensor:
        """Take `TrainingStep`'s step for a padded batch. The next step overwrites the loss that is returned.

        Raises ValueError for a batch of another shape than the first.
        """
        self.prepare(batch, states)
        captured = self._captured
        if batch.shape != captured.shape:
            raise ValueError(f"batch: expected the captured {captured.shape}, found {batch.shape}")
        captured.buffer.copy_(batch.packed() if batch.buffer is None else batch.buffer)
        for rows, view in zip(captured.gathered, states):
            rows.copy_(view.table)
        return captured.run()

    def prepare(self, batch: Batch, states: list[States]) -> None:
        """Capture the step for the shape of a padded batch, unless one is captured already. Nothing is trained."""
        if self._captured is None:
            packed = batch.packed() if batch.buffer is None else batch.buffer
            self._captured = self._capture_on_buffers(packed, batch.shape, states)

    def _capture_on_buffers(self, packed: Tensor, shape: Shape, states: list[States]) -> _Captured:
        buffer = packed.to(self.step.record.device, copy=True)
        batch = Batch.unpacked(buffer, shape)
        gathered = [view.table.clone() for view in states if view.rows is None]
        views = [States(rows) for rows in gathered] or [States(view.table, batch.distinct) for view in states]
        return _Captured(shape, buffer, gathered, self.capture(lambda: self.step(batch, views)))


class _Captured(NamedTuple):
    shape: Shape
    buffer: Tensor  # every batch is copied into it
    gathered: list[Tensor]  # likewise its items' states by view; none where the device holds the table
    run: Callable[[], Tensor]
