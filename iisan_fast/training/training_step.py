"""Take one optimizer step by autograd: loss, gradients, update.

Nothing in a step waits for the device. On CUDA a step can be captured and replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..data import Batch, Shape
from ..kernels import States
from ..models import Recommender
from ..ranks import ALONE, Ranks
from ..states import ItemInputs
from .cuda_graphs import capture_in_a_graph
from .optimizer import Adam
from .step_record import add_loss
from .update_options import PLAIN_ADAM, UpdateOptions, update_groups

SMALL_BATCH_ROWS = 1024  # for a smaller batch, small operators gain nothing from several threads of a CPU


class Reading(NamedTuple):
    """The result of the steps since the last reading."""

    loss: float  # the sum of the losses of all rows
    rows: int  # of the batches, without padding
    failed_step: int | None  # the first step whose loss is not finite, counted from 1; no update follows it
    failed_loss: float

    @classmethod
    def of(cls, record: Tensor) -> Reading:
        """Read the record of a step, and set its two sums to 0.

        record: float64 [4] with the sum of losses, the rows, the first failed step (0 for none) and its loss.
        """
        loss, rows, step, failed_loss = record.tolist()
        record[:2] = 0
        return cls(loss, int(rows), int(step) or None, failed_loss)


class TrainingStep:
    """A model and its optimizer, by autograd.

    If a loss is not finite, the record stores the number of that step, and no later step updates anything.
    """

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        device: torch.device,
        options: UpdateOptions = PLAIN_ADAM,
        ranks: Ranks = ALONE,
        item_ranks: Ranks | None = None,
    ) -> None:
        """Make the optimizer of a model that is on the device.

        rates: learning rates by group of parameters. ranks: the processes that take each step together, each with its
        share of the batch. item_ranks: those that share out its items, by default all; ALONE with local negatives.
        """
        self.model = model
        self.ranks = ranks
        self.item_ranks = ranks if item_ranks is None else item_ranks
        groups = [group for group in update_groups(model, rates, options) if group.parameters]
        self._rates = [group.rate for group in groups]
        # On CUDA a captured step reads rates that change from tensors.
        in_tensors = options.scheduled and device.type == "cuda"
        lrs = [torch.tensor(rate, device=device) if in_tensors else rate for rate in self._rates]
        self.optimizer = Adam(
            [{"params": group.parameters, "lr": rate, "weight_decay": group.decay} for group, rate in zip(groups, lrs)],
            device,
        )
        self._trained = [parameter for group in groups for parameter in group.parameters]
        self._clip_norm = options.clip_norm
        self._ema_decay = options.ema_decay
        # The average of each parameter; empty without averages.
        self.averages: dict[nn.Parameter, Tensor] = {}
        if options.ema_decay:
            self.averages = {parameter: parameter.detach().clone() for parameter in self._trained}
        # Sum of losses, rows, first failed step (0: none), its loss.
        self.record = torch.zeros(4, dtype=torch.float64, device=device)

    def __call__(self, batch: Batch, inputs: ItemInputs, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        """Take one step, and return the loss of the whole batch before its update, a scalar on the device.

        inputs: of the items batch.encoded, as an item source reads them. mark: called with "forward", "backward" and
        "update" when that phase ends. Raises ValueError if several ranks take a batch that is no share, or one a share.
        """
        shared = self.item_ranks.several
        if shared == (batch.block is None):
            raise ValueError(f"batch.block: expected {'one' if shared else 'none'}, found {batch.block}")
        # The ranks must take one number of threads, on which the bits of a sum depend; their rows differ in number, and
        # local items too.
        size = len(batch.distinct) if shared else len(batch.targets)
        small = self.record.is_cpu and size <= SMALL_BATCH_ROWS and self.model.item_encoder.small_operators
        with kernels.in_large_pieces() if small and shared == self.ranks.several else nullcontext():
            return self._take(batch, inputs, mark)

    def scale_rates(self, factor: float) -> None:
        """Set all learning rates to a factor of those of the settings, for the next steps.

        Raises ValueError on CUDA if the step's options do not say that the rates change.
        """
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            elif self.record.is_cuda:
                raise ValueError("options: expected scheduled, found rates that a captured step would not read again")
            else:
                group["lr"] = rate * factor

    def _take(self, batch: Batch, inputs: ItemInputs, mark: Callable[[str], None]) -> Tensor:
        """Take the step of `__call__`."""
        self.model.zero_grad()
        loss = self.model.loss(batch, inputs, self.item_ranks)
        mark("forward")
        noted = self._note(loss.detach(), batch)
        loss.backward()
        if self.ranks.several:
            self._add_gradients()
        mark("backward")
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, self._clip_norm)
        self.optimizer.update()
        if self.averages:
            self._follow()
        mark("update")
        return noted

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averages towards the updated parameters. After a loss that is not finite, they stay as they are.

        The share of the parameters is 1 - ema_decay, or 9 / (10 + steps) if that is more.
        """
        steps = self.optimizer.state[self._trained[0]]["step"].double()
        share = torch.clamp(9 / (10 + steps), min=1 - self._ema_decay) * (self.record[2] == 0)
        averages = list(self.averages.values())
        differences = torch._foreach_sub(self._trained, averages)
        torch._foreach_mul_(differences, share.to(averages[0].dtype))
        torch._foreach_add_(averages, differences)

    def _add_gradients(self) -> None:
        """Add up the gradients over the ranks, in one exchange for each dtype."""
        for dtype in dict.fromkeys(parameter.dtype for parameter in self._trained):
            trained = [weight for weight in self._trained if weight.dtype == dtype and weight.grad is not None]
            summed = self.ranks.add_up(torch.cat([weight.grad.flatten() for weight in trained]))
            for weight, gradient in zip(trained, summed.split([weight.numel() for weight in trained])):
                weight.grad = gradient.view_as(weight)

    def _note(self, loss: Tensor, batch: Batch) -> Tensor:
        """Add a step's loss to the record, and return it; on several ranks both are of the whole batch.

        After the first loss that is not finite, nothing is added or updated.
        """
        rows = (batch.weights > 0).sum()
        if self.ranks.several:
            whole, rows = self.ranks.add_up(torch.stack([loss.double(), rows.double()]))
            loss = whole.to(loss.dtype)
        add_loss(self.record, loss, rows, batch.step)
        self.optimizer.found_inf = (self.record[2] > 0).float()  # if it is 1, the fused optimizer changes nothing
        return loss

    def read(self) -> Reading:
        """Return the losses since the last call, and the first failed step if there is one. Waits for the device."""
        return Reading.of(self.record)


class CapturedStep:
    """A step by autograd as a CUDA graph, captured once for batches that are padded to one shape."""

    def __init__(
        self, step: TrainingStep, capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None
    ) -> None:
        """Take the step to capture.

        capture: turns a function without arguments into the one that every step calls; None for a CUDA graph.
        """
        self.step = step
        self.capture = capture or functools.partial(capture_in_a_graph, record=step.record)
        self._captured: _Captured | None = None

    def __call__(self, batch: Batch, states: list[States]) -> Tensor:
        """Take the step for a padded batch, and return its loss, which the next step overwrites.

        states: the views of the batch's items. Raises ValueError if the batch has another shape than the first one.
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
        """Capture the step for the shape of a padded batch, unless this is done already. Parameters do not change."""
        if self._captured is None:
            packed = batch.packed() if batch.buffer is None else batch.buffer
            self._captured = self._capture_on_buffers(packed, batch.shape, states, batch.block)

    def _capture_on_buffers(
        self, packed: Tensor, shape: Shape, states: list[States], block: slice | None = None
    ) -> _Captured:
        """Capture the step on buffers, into which later batches and their states are copied.

        block: of all batches, the items that this rank encodes; None for all.
        """
        buffer = packed.to(self.step.record.device, copy=True)
        batch = Batch.unpacked(buffer, shape, block)
        gathered = [view.table.clone() for view in states if view.rows is None]
        views = [States(rows) for rows in gathered] or [States(view.table, batch.encoded) for view in states]
        return _Captured(shape, buffer, gathered, self.capture(lambda: self.step(batch, views)))


class _Captured(NamedTuple):
    """A captured step and its input buffers."""

    shape: Shape
    buffer: Tensor  # for a packed batch
    gathered: list[Tensor]  # for the states of its items, by view; empty if the device holds the table
    run: Callable[[], Tensor]
