"""Record losses in Triton: one program adds up a step's losses and records the first that is not finite."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import HEADER
from .configurations import only_configuration
from .launch import launch


class LossRecord:
    """Write a step's mean loss and count the step.

    Each call writes `loss`. While all losses are finite, it adds the sum of losses to record[0] and the rows to
    record[1], and 1 to `steps`. The first loss that is not finite sets record[2] to 1 + its step and record[3] to the
    loss. `counter`, the index of the next batch, grows as long as record[2] was 0 before the call. So steps that run
    with record[2] set, as the warm-up before a graph capture does, write only `loss` and select the same batch again.

    Where several ranks train together, `forward` writes this rank's part of the mean loss to the share alone. When the
    ranks have added up their shares, `count` does the rest.
    """

    def __init__(
        self,
        losses: Tensor,
        header: Tensor,
        tile_rows: int,
        record: Tensor,
        loss: Tensor,
        steps: Tensor,
        counter: Tensor,
        share: Tensor | None = None,
    ) -> None:
        """Store the tensors.

        Args:
            losses: fp32 [M], the loss of each row; 0 for padding rows within the true tiles; not read beyond them.
            header: int32, the header of a `StepBatch`.
            tile_rows: rows of a tile.
            record: fp64 [4].
            loss: fp32 [1].
            steps: fp32 scalar.
            counter: int32 [1].
            share: fp32 [1 or more], whose first number is this rank's part of the mean; None for one rank.
        """
        self._operands = (losses, header, record, loss, steps, counter)
        self._tile_rows = tile_rows
        self._share = share

    def forward(self) -> None:
        """Launch the record, or this rank's share. The trainer's `TrainingStep` has the same rule in PyTorch."""
        if self._share is not None:
            self._write_share(self._share)
            return
        chosen = only_configuration("loss_record", self._operands[0].device)
        launch(
            _record,
            "loss_record",
            (1,),
            chosen,
            *self._operands,
            self._tile_rows,
            ROWS=HEADER.index("rows"),
            TILES=HEADER.index("tiles"),
            STEP=HEADER.index("step"),
            **chosen.blocks,
        )

    def _write_share(self, share: Tensor) -> None:
        """Launch this rank's part of the mean loss."""
        losses, header, *_ = self._operands
        chosen = only_configuration("loss_share", losses.device)
        launch(
            _write_mean,
            "loss_share",
            (1,),
            chosen,
            losses,
            header,
            share,
            self._tile_rows,
            ROWS=HEADER.index("rows"),
            TILES=HEADER.index("tiles"),
            **chosen.blocks,
        )

    def count(self) -> None:
        """Launch the record of the mean loss that the share has, the sum over the ranks."""
        _, *others = self._operands
        chosen = only_configuration("record_share", others[0].device)
        indices = {"ROWS": HEADER.index("rows"), "STEP": HEADER.index("step")}
        launch(_record_mean, "record_share", (1,), chosen, self._share, *others, **indices)


@triton.jit
def _mean_loss(
    losses_ptr,
    header_ptr,
    tile_rows,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the sum of the losses in fp64, BLOCK at a time, by the rows of the batch, in fp32."""
    places = tl.load(header_ptr + TILES) * tile_rows
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, places, BLOCK):
        o_r = first + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + o_r, mask=o_r < places, other=0.0).to(tl.float64)
    return (tl.sum(total, 0) / tl.load(header_ptr + ROWS).to(tl.float64)).to(tl.float32)


@triton.jit
def _count_step(
    mean,
    header_ptr,
    record_ptr,
    loss_ptr,
    steps_ptr,
    counter_ptr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Update loss, record, steps and counter with the mean loss of a batch."""
    tl.store(loss_ptr, mean)
    if tl.load(record_ptr + 2) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)
        value = mean.to(tl.float64)
        if tl.abs(mean) < float("inf"):
            rows = tl.load(header_ptr + ROWS).to(tl.float64)
            tl.store(record_ptr, tl.load(record_ptr) + value * rows)
            tl.store(record_ptr + 1, tl.load(record_ptr + 1) + rows)
            tl.store(steps_ptr, tl.load(steps_ptr) + 1)
        else:
            tl.store(record_ptr + 2, tl.load(header_ptr + STEP).to(tl.float64) + 1)
            tl.store(record_ptr + 3, value)


@triton.jit
def _record(
    losses_ptr,  # [M]
    header_ptr,
    record_ptr,  # [4]
    loss_ptr,  # [1]
    steps_ptr,  # [1]
    counter_ptr,  # [1]
    tile_rows,
    ROWS: tl.constexpr,  # indices in the header
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the losses, and update loss, record, steps and counter."""
    mean = _mean_loss(losses_ptr, header_ptr, tile_rows, ROWS, TILES, BLOCK)
    _count_step(mean, header_ptr, record_ptr, loss_ptr, steps_ptr, counter_ptr, ROWS, STEP)


@triton.jit
def _write_mean(
    losses_ptr,  # [M]
    header_ptr,
    share_ptr,  # [1]
    tile_rows,
    ROWS: tl.constexpr,  # indices in the header
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of a rank's losses by the rows of the whole batch."""
    tl.store(share_ptr, _mean_loss(losses_ptr, header_ptr, tile_rows, ROWS, TILES, BLOCK))


@triton.jit
def _record_mean(
    mean_ptr,  # [1]
    header_ptr,
    record_ptr,  # [4]
    loss_ptr,  # [1]
    steps_ptr,  # [1]
    counter_ptr,  # [1]
    ROWS: tl.constexpr,  # indices in the header
    STEP: tl.constexpr,
):
    """Update loss, record, steps and counter."""
    _count_step(tl.load(mean_ptr), header_ptr, record_ptr, loss_ptr, steps_ptr, counter_ptr, ROWS, STEP)
