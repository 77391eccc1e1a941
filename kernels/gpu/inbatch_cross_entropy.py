"""Debiased in-batch cross-entropy in Triton: logits are made tile by tile, used, and never stored.

The forward is row-stationary with a running maximum. The gradient of the queries is row-stationary too, that of the
items column-stationary; each makes the logits again, so there are no atomics and results repeat bit for bit.
Everything but the operands of the products is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import inbatch_cross_entropy_kernels as device
from .configurations import configuration
from .launch import block, fit_range, launch, precision


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> Tensor:
    """Return the reference's losses in fp32 [R]; the caller has checked the arguments."""
    queries, items = (operand if operand.stride(1) == 1 else operand.contiguous() for operand in (queries, items))
    others = (targets, row_users, history_bits, log_multiplicity, log_popularity)
    losses, _ = _row_losses(queries, items, *(value if value is None else value.contiguous() for value in others))
    return losses


@torch.library.custom_op("iisan_fast::row_losses", mutates_args=())
def _row_losses(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss, log Z), both fp32 [R]."""
    (rows, d), columns = queries.shape, len(items)
    losses, log_z = (torch.empty(rows, dtype=torch.float32, device=queries.device) for _ in range(2))
    chosen = configuration("loss_forward", rows, queries.dtype, queries.device, d)
    launch(
        device.forward,
        "loss_forward",
        (triton.cdiv(rows, chosen.blocks["BM"]),),
        chosen,
        queries,
        queries.stride(0),
        items,
        items.stride(0),
        targets,
        *_columns(items, row_users, history_bits, log_multiplicity, log_popularity),
        losses,
        log_z,
        rows,
        columns,
        d,
        **_meta(queries, history_bits, log_multiplicity, log_popularity),
        **chosen.blocks,
    )
    return losses, log_z


@_row_losses.register_fake
def _(queries, items, targets, row_users, history_bits, log_multiplicity, log_popularity):
    losses = queries.new_empty(queries.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("iisan_fast::row_losses_backward", mutates_args=())
def _row_losses_backward(
    gradient: Tensor,
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
    log_z: Tensor,
    of_queries: bool,
    of_items: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and items in their dtypes; one that is not wanted is an empty tensor."""
    rows, columns, d = len(queries), len(items), queries.shape[1]
    column_data = _columns(items, row_users, history_bits, log_multiplicity, log_popularity)
    shared = (queries, queries.stride(0), items, items.stride(0), targets, *column_data, log_z)
    meta = _meta(queries, history_bits, log_multiplicity, log_popularity)
    query_gradients = torch.empty((rows, d) if of_queries else 0, dtype=queries.dtype, device=queries.device)
    item_gradients = torch.empty(0, dtype=items.dtype, device=items.device)
    if of_queries:
        chosen = configuration("loss_query_gradients", rows, queries.dtype, queries.device, d)
        launch(
            device.query_gradients,
            "loss_query_gradients",
            (triton.cdiv(rows, chosen.blocks["BM"]),),
            chosen,
            *shared,
            gradient,
            gradient.stride(0),
            query_gradients,
            rows,
            columns,
            d,
            **meta,
            **chosen.blocks,
        )
    if of_items:
        chosen = configuration("loss_item_gradients", rows, queries.dtype, queries.device, d)
        blocks = {name: chosen.blocks[name] for name in ("BM", "BN")}
        tiles, column_tiles = triton.cdiv(rows, blocks["BM"]), triton.cdiv(columns, blocks["BN"])
        splits = max(1, min(tiles, chosen.blocks["PROGRAMS"] // max(1, column_tiles)))
        gradient, factor = fit_range(gradient, items.dtype)
        parts = torch.empty((splits, columns, d), dtype=torch.float32, device=items.device)
        launch(
            device.item_gradients,
            "loss_item_gradients",
            (column_tiles, splits),
            chosen,
            *shared,
            gradient,
            gradient.stride(0),
            parts,
            rows,
            columns,
            d,
            triton.cdiv(tiles, splits),
            **meta,
            **blocks,
        )
        total = parts.sum(0)
        item_gradients = (total if factor is None else total / factor).to(items.dtype)
    return query_gradients, item_gradients


@_row_losses_backward.register_fake
def _(
    gradient,
    queries,
    items,
    targets,
    row_users,
    history_bits,
    log_multiplicity,
    log_popularity,
    log_z,
    of_queries,
    of_items,
):
    return (queries.new_empty(queries.shape if of_queries else 0), items.new_empty(items.shape if of_items else 0))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, gradient: Tensor, _log_z: None) -> tuple:
    needs = ctx.needs_input_grad[:2]
    gradients = _row_losses_backward(gradient, *ctx.saved_tensors, *needs)
    return *(value if need else None for value, need in zip(gradients, needs)), None, None, None, None, None


_row_losses.register_autograd(_backward, setup_context=_setup_context)


def _columns(
    items: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> tuple[Any, ...]:
    """The kernels' arguments for the mask and the two corrections; where there is none, a pointer that is not read."""
    own = (items, items, 0) if history_bits is None else (row_users, history_bits, history_bits.stride(0))
    return (*own, *(items if values is None else values for values in (log_multiplicity, log_popularity)))


def _meta(
    queries: Tensor, history_bits: Tensor | None, log_multiplicity: Tensor | None, log_popularity: Tensor | None
) -> dict[str, Any]:
    return {
        "BD": block(queries.shape[1], most=1 << 20),
        "MASKED": history_bits is not None,
        "COUNTED": log_multiplicity is not None,
        "DEBIASED": log_popularity is not None,
        "PRECISION": precision(queries.dtype),
    }
