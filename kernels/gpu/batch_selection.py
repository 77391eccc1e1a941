"""Select a step's batch in Triton: copy it from the window, and compute the loss's constants of its distinct items."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import HEADER, StepBatch, StepShape
from .configurations import only_configuration
from .launch import launch


class SelectBatch:
    """Copy one packed batch of a window to the buffer that the kernels of a step read.

    Attributes: batch, views of the buffer; column_bias fp32 [V], log2 multiplicity - log2 popularity of each distinct
    item, minus infinity beyond the true count; column_log2_popularity fp32 [V], 0 beyond the true count.
    """

    def __init__(
        self, window: Tensor, counter: Tensor, buffer: Tensor, shape: StepShape, log2_popularity: Tensor
    ) -> None:
        """Allocate the outputs.

        Args:
            window: int32 [batches, words], packed batches.
            counter: int32 [1], the index of the batch to select.
            buffer: int32 [words].
            shape: the sizes of the batches.
            log2_popularity: fp32 [items + 1], by item number.

        Raises ValueError if window or buffer do not have the words of the shape.
        """
        starts = shape.starts()
        if window.shape[1:] != buffer.shape or len(buffer) != starts[-1]:
            raise ValueError(f"window: expected batches of {starts[-1]} words, found {window.shape} for {buffer.shape}")
        self.batch = StepBatch.of(buffer, shape)
        self.column_bias = torch.empty(shape.distinct, dtype=torch.float32, device=buffer.device)
        self.column_log2_popularity = torch.empty_like(self.column_bias)
        fields = dict(zip(shape.fields(), starts))
        offsets = fields.get("whole_offsets", fields["offsets"])
        self._layout = (starts[-1], fields["distinct"], offsets, shape.distinct)
        self._operands = (window, counter, buffer, log2_popularity)

    def forward(self) -> None:
        """Launch the copy; write the buffer, column_bias and column_log2_popularity."""
        window, counter, buffer, log2_popularity = self._operands
        chosen = only_configuration("select_batch", buffer.device)
        launch(
            _select,
            "select_batch",
            (triton.cdiv(len(buffer), chosen.blocks["BLOCK"]),),
            chosen,
            window,
            counter,
            buffer,
            log2_popularity,
            self.column_bias,
            self.column_log2_popularity,
            *self._layout,
            DISTINCT=HEADER.index("distinct"),
            **chosen.blocks,
        )


@triton.jit
def _select(
    window_ptr,  # [B, words]
    counter_ptr,  # [1]
    buffer_ptr,  # [words]
    log2_popularity_ptr,  # [items + 1]
    bias_ptr,  # [V]
    column_popularity_ptr,  # [V]
    words,
    distinct_start,  # where the fields start in a batch
    offsets_start,
    V,
    DISTINCT: tl.constexpr,  # index in the header of the number of distinct items
    BLOCK: tl.constexpr,
):
    """Copy BLOCK words of the batch; the programs below V / BLOCK also write the constants of BLOCK columns."""
    first = tl.program_id(0) * BLOCK
    o_w = first + tl.arange(0, BLOCK)
    p_batch = window_ptr + tl.load(counter_ptr).to(tl.int64) * words
    tl.store(buffer_ptr + o_w, tl.load(p_batch + o_w, mask=o_w < words), mask=o_w < words)
    if first < V:
        m_v = o_w < tl.load(p_batch + DISTINCT)
        item = tl.load(p_batch + distinct_start + o_w, mask=m_v, other=0)
        start = tl.load(p_batch + offsets_start + o_w, mask=m_v, other=0)
        end = tl.load(p_batch + offsets_start + 1 + o_w, mask=m_v, other=1)
        popularity = tl.load(log2_popularity_ptr + item, mask=m_v, other=0.0)
        bias = tl.log2((end - start).to(tl.float32)) - popularity
        tl.store(bias_ptr + o_w, tl.where(m_v, bias, -float("inf")), mask=o_w < V)
        tl.store(column_popularity_ptr + o_w, popularity, mask=o_w < V)
