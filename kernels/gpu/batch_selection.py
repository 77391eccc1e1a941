"""The batch of a step in Triton: copied from a window of packed batches, with the loss's numbers of its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import HEADER, StepBatch, StepShape
from .configurations import only_configuration
from .launch import launch


class SelectBatch:
    """Select one batch of a window, for the kernels of a step.

    Writes `batch` (views of the buffer) and, by column, `column_bias` fp32 [V]: log2 of the multiplicity less log2 of
    the popularity, minus infinity beyond the true columns; `column_log2_popularity` fp32 [V]: 0 there.
    """

    def __init__(
        self, window: Tensor, counter: Tensor, buffer: Tensor, shape: StepShape, log2_popularity: Tensor
    ) -> None:
        """Args: window int32 [batches, words]; counter int32 [1], which batch of it; buffer int32 [words];
        log2_popularity fp32 [items + 1].
        """
        starts = shape.starts()
        if window.shape[1:] != buffer.shape or len(buffer) != starts[-1]:
            raise ValueError(f"window: expected batches of {starts[-1]} words, found {window.shape} for {buffer.shape}")
        self.batch = StepBatch.of(buffer, shape)
        self.column_bias = torch.empty(shape.distinct, dtype=torch.float32, device=buffer.device)
        self.column_log2_popularity = torch.empty_like(self.column_bias)
        fields = dict(zip(shape.fields(), starts))
        self._layout = (starts[-1], fields["distinct"], fields["offsets"], shape.distinct)
        self._operands = (window, counter, buffer, log2_popularity)

    def forward(self) -> None:
        """Copy the batch and set its columns' numbers."""
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
    DISTINCT: tl.constexpr,  # the place of their number in the header
    BLOCK: tl.constexpr,
):
    """Copy a part of the batch's words; the first programs also write a part of its columns."""
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
