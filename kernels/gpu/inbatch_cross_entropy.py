"""Debiased in-batch cross-entropy in Triton: logits are computed tile by tile and never stored.

In the forward and in the queries' gradient a program owns a tile of rows; in the items' gradient, a block of columns.
Each launch computes the logits again, without atomics, so results repeat bit for bit. Everything is fp32 but the
operands of the products. The pair of a training step and the public op run the same kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..types import StepBatch, StepShape
from . import inbatch_cross_entropy_kernels as device
from .configurations import Configuration, configuration
from .launch import block, fit_range, launch, precision

EMBEDDING_DIMS = (32, 64, 128)  # widths that the pair takes; the op pads others
ROW_BLOCK = 128  # a multiple of every tile size BM: results of rows are allocated in such blocks


class LossOperands(NamedTuple):
    """The kernels' operands, all contiguous. Any tensor may stand for an operand that is not read."""

    queries: Tensor  # [R, d]
    items: Tensor  # [V, d]
    targets: Tensor  # int32 [R]
    inputs: Tensor  # int32 [R]: -1 for padding rows; read if tile_rows > 0
    row_users: Tensor  # int32 [R]; read if is_masked
    bits: Tensor  # int32 [words, users]; read if is_masked
    bias: Tensor  # [V rounded up to 32]: log2 m - log2 p, minus infinity beyond the columns
    log2_p: Tensor  # [V]
    header: Tensor  # int32, of a `StepBatch`; read if tile_rows > 0
    tile_rows: int  # rows of a tile; 0 without a header: all rows and columns count
    is_masked: bool  # the users' items are left out of Z

    def configuration(self, kernel: str) -> Configuration:
        """Return the configuration of a kernel, a key of `CONFIGURATIONS`, for these operands."""
        rows, d = self.queries.shape
        return configuration(kernel, rows, self.queries.dtype, self.queries.device, d)

    def meta(self) -> dict[str, Any]:
        """Return the constexpr arguments that all kernels take."""
        return {
            "TILE_ROWS": self.tile_rows,
            "MASKED": self.is_masked,
            "PRECISION": precision(self.queries.dtype),
            "BD": self.queries.shape[1],
        }


class RowResults(NamedTuple):
    """The forward's results, fp32; the backward reads the last two, which have whole blocks of rows."""

    losses: Tensor  # [R]
    log2_z: Tensor  # [R rounded up to ROW_BLOCK]: infinite for padding rows
    target_weights: Tensor  # [R rounded up to ROW_BLOCK]: probability of the target minus 1

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> RowResults:
        """Return uninitialised results for `rows` rows on the device of the tensor `like`."""
        sizes = (rows, *2 * (padded_rows(rows),))
        return cls(*(like.new_empty(size, dtype=torch.float32) for size in sizes))


class InbatchCrossEntropy:
    """The loss of a packed batch as a pair; the gradient is that of the mean over the batch's rows.

    Attributes: losses fp32 [M] in nats, 0 for padding rows; of_states fp32 [M, d], the gradient of the states, 0 for
    padding rows and not written beyond the batch's tiles; item_parts, parts of the items' gradient, which
    `ItemVectorGradients` adds up. Item vectors beyond the batch's items are not used. The states of padding rows within
    the batch's tiles must be finite.
    """

    def __init__(
        self,
        state_operands: Tensor,
        vector_operands: Tensor,
        batch: StepBatch,
        column_bias: Tensor,
        column_log2_popularity: Tensor,
        shape: StepShape,
        dtype: torch.dtype,
    ) -> None:
        """Allocate all memory.

        Args:
            state_operands: [M, d] in `dtype`, the sequence encoder's states.
            vector_operands: [V, d] in `dtype`, the item vectors.
            batch: the packed batch; shape: its sizes.
            column_bias, column_log2_popularity: fp32 [V], as `SelectBatch` writes them.
            dtype: of the matrix products.

        Raises ValueError for a width d outside `EMBEDDING_DIMS` and for operands of another dtype.
        """
        rows, d = state_operands.shape
        if d not in EMBEDDING_DIMS:
            raise ValueError(f"embedding dimension: expected one of {EMBEDDING_DIMS}, found {d}")
        if (state_operands.dtype, vector_operands.dtype) != (dtype, dtype):
            raise ValueError(
                f"operands: expected {dtype}, found states of {state_operands.dtype} and vectors of "
                f"{vector_operands.dtype}"
            )
        self.batch = batch
        self.shape = shape
        self.operands = LossOperands(
            state_operands,
            vector_operands,
            batch.targets,
            batch.inputs,
            batch.row_users,
            batch.history_bits,
            column_bias,
            column_log2_popularity,
            batch.header,
            shape.tile_rows,
            is_masked=True,
        )
        self.results = RowResults.empty(rows, like=state_operands)
        self.losses = self.results.losses
        self.of_states = torch.empty_like(state_operands, dtype=torch.float32)
        self.item_parts = new_item_parts(self.operands)

    def forward(self) -> None:
        """Launch the losses."""
        row_losses(self.operands, self.results)

    def backward(self) -> None:
        """Launch the gradient of the states, and the parts of the items' gradient."""
        no_gradient = self.losses  # not read: with a header the kernels use the gradient of the mean
        query_gradients(self.operands, self.results, no_gradient, self.of_states)
        item_gradients(self.operands, self.results, no_gradient, self.item_parts)


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> Tensor:
    """Return the loss of each row, fp32 [R]; the caller has checked the arguments."""
    columns = len(items)
    zeros = torch.zeros(columns, dtype=torch.float32, device=items.device)
    log2_p = zeros if log_popularity is None else log_popularity.float() / math.log(2)
    log2_m = zeros if log_multiplicity is None else log_multiplicity.float() / math.log(2)
    losses, _, _ = _row_losses(
        _whole(queries),
        _whole(items),
        targets.to(torch.int32),
        None if row_users is None else row_users.to(torch.int32),
        None if history_bits is None else history_bits.T.contiguous(),
        F.pad(log2_m - log2_p, (0, -columns % 32), value=-math.inf),
        log2_p,
    )
    return losses


@torch.library.custom_op("iisan_fast::row_losses", mutates_args=())
def _row_losses(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    bits: Tensor | None,
    bias: Tensor,
    log2_p: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses [R], log2_z, target_weights) of operands laid out as in `LossOperands`."""
    results = RowResults.empty(len(queries), like=queries)
    row_losses(_operands(queries, items, targets, row_users, bits, bias, log2_p), results)
    return tuple(results)


@_row_losses.register_fake
def _(queries, items, targets, row_users, bits, bias, log2_p):
    """Return empty (losses [R], log2_z, target_weights), shaped as `_row_losses` returns them."""
    return tuple(RowResults.empty(queries.shape[0], like=queries))


@torch.library.custom_op("iisan_fast::row_losses_backward", mutates_args=())
def _row_losses_backward(
    gradient: Tensor,
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    bits: Tensor | None,
    bias: Tensor,
    log2_p: Tensor,
    log2_z: Tensor,
    target_weights: Tensor,
    of_queries: bool,
    of_items: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries [R, d] and items [V, d] in their dtypes; empty unless of_queries, of_items."""
    operands = _operands(queries, items, targets, row_users, bits, bias, log2_p)
    results = RowResults(gradient, log2_z, target_weights)
    gradient = gradient.float().contiguous()
    query_gradient = queries.new_empty(queries.shape if of_queries else 0)
    item_gradient = items.new_zeros(items.shape if of_items else 0)
    if of_queries:
        query_gradients(operands, results, gradient, query_gradient)
    if of_items and len(queries):
        gradient, factor = fit_range(gradient, items.dtype)
        parts = new_item_parts(operands)
        item_gradients(operands, results, gradient, parts)
        columns = triton.cdiv(len(items), parts.shape[1]) * parts.shape[1]
        total = parts.view(-1, columns, items.shape[1]).sum(0)[: len(items)]
        item_gradient = (total if factor is None else total / factor).to(items.dtype)
    return query_gradient, item_gradient


@_row_losses_backward.register_fake
def _(
    gradient,
    queries,
    items,
    targets,
    row_users,
    bits,
    bias,
    log2_p,
    log2_z,
    target_weights,
    of_queries,
    of_items,
):
    """Return empty tensors with the shapes and dtypes of `_row_losses_backward`."""
    return (queries.new_empty(queries.shape if of_queries else 0), items.new_empty(items.shape if of_items else 0))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save the tensors and settings that `_backward` needs."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, gradient: Tensor, *_others: None) -> tuple:
    """Return the gradients of queries and items from that of the losses; None for other arguments."""
    needs = ctx.needs_input_grad[:2]
    gradients = _row_losses_backward(gradient, *ctx.saved_tensors, *needs)
    return *(value if need else None for value, need in zip(gradients, needs)), None, None, None, None, None


_row_losses.register_autograd(_backward, setup_context=_setup_context)


def _whole(operand: Tensor) -> Tensor:
    """Return a contiguous copy of rows [., d], padded with zeros to the next power of two of at least 16."""
    d = operand.shape[1]
    return F.pad(operand, (0, block(d, most=1 << 20) - d)).contiguous()


def _operands(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    bits: Tensor | None,
    bias: Tensor,
    log2_p: Tensor,
) -> LossOperands:
    """Return the operands of the public op: without header, and without mask if bits is None."""
    is_masked = row_users is not None and bits is not None
    mask = (row_users, bits) if is_masked else (targets, targets)
    return LossOperands(
        queries, items, targets, targets, *mask, bias, log2_p, header=targets, tile_rows=0, is_masked=is_masked
    )


def padded_rows(rows: int) -> int:
    """Return a number of rows, rounded up to a multiple of ROW_BLOCK."""
    return -(-rows // ROW_BLOCK) * ROW_BLOCK


def new_item_parts(operands: LossOperands) -> Tensor:
    """Return uninitialised memory for the parts of the items' gradient: fp32 [programs, columns of a program, d].

    A program takes a block of columns and a split of the rows. With a header the true counts are unknown on the host,
    so there are as many programs as any counts may need.
    """
    sizes = operands.configuration("loss_item_gradients").blocks
    (rows, d) = operands.queries.shape
    columns = sizes["BN"] * sizes["SUB"]
    blocks, tiles = triton.cdiv(len(operands.items), columns), triton.cdiv(rows, sizes["BM"])
    if operands.tile_rows:
        programs = max(blocks, min(sizes["PROGRAMS"], blocks * tiles))
    else:
        programs = blocks * max(1, min(sizes["PROGRAMS"] // blocks, tiles))
    return operands.items.new_empty((programs, columns, d), dtype=torch.float32)


def row_losses(operands: LossOperands, results: RowResults) -> None:
    """Launch the forward; write all `results`."""
    rows = len(operands.queries)
    chosen = operands.configuration("loss_forward")
    launch(
        device.forward,
        "loss_forward",
        (padded_rows(rows) // chosen.blocks["BM"],),
        chosen,
        operands.queries,
        operands.items,
        operands.targets,
        operands.inputs,
        operands.row_users,
        operands.bits,
        operands.bits.stride(0),
        operands.bias,
        operands.log2_p,
        operands.header,
        *results,
        rows,
        len(operands.items),
        **operands.meta(),
        **chosen.blocks,
    )


def query_gradients(operands: LossOperands, results: RowResults, gradient: Tensor, out: Tensor) -> None:
    """Launch the gradient of the queries into `out` [R, d]; gradient fp32 [R] of the losses, not read with a header."""
    rows = len(operands.queries)
    chosen = operands.configuration("loss_query_gradients")
    launch(
        device.query_gradients,
        "loss_query_gradients",
        (triton.cdiv(rows, chosen.blocks["BM"]),),
        chosen,
        operands.queries,
        operands.items,
        operands.targets,
        operands.row_users,
        operands.bits,
        operands.bits.stride(0),
        operands.bias,
        operands.header,
        *results[1:],
        gradient,
        out,
        rows,
        len(operands.items),
        **operands.meta(),
        **chosen.blocks,
    )


def item_gradients(operands: LossOperands, results: RowResults, gradient: Tensor, parts: Tensor) -> None:
    """Launch the items' gradient into `parts` of `new_item_parts`; gradient as in `query_gradients`."""
    chosen = operands.configuration("loss_item_gradients")
    launch(
        device.item_gradients,
        "loss_item_gradients",
        (len(parts),),
        chosen,
        operands.queries,
        operands.items,
        operands.targets,
        operands.row_users,
        operands.bits,
        operands.bits.stride(0),
        operands.bias,
        operands.header,
        *results[1:],
        gradient,
        parts,
        len(operands.queries),
        len(operands.items),
        **operands.meta(),
        **chosen.blocks,
    )
