"""The debiased in-batch cross-entropy on a CPU by C++: `cpp/cross_entropy.cpp`, a share of the rows a core."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import shares
from .library import DTYPES, PANEL, library, share_out
from .step_memory import Memory
from .sums import add_up

MOST_WORKERS = 4  # each has a gradient of all items, which are added up


def row_losses(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> Tensor:
    """`reference.row_losses` for queries and items that `takes` accepts; no gradient flows to the last two. Not
    differentiable twice."""
    column = log_multiplicity
    if log_popularity is not None:
        column = -log_popularity if column is None else column - log_popularity
    constants = Constants(targets, row_users, history_bits, column, log_multiplicity)
    kept = Constants(*(None if each is None else each.contiguous() for each in constants))
    return _RowLosses.apply(kept, queries, items)


def takes(queries: Tensor, items: Tensor, *constants: Tensor | None) -> bool:
    """Whether the C++ knows these tensors: of one dtype, and a width in whole panels."""
    same = {each.dtype for each in (queries, items, *constants) if each is not None}
    fixed = not any(each is not None and each.requires_grad for each in constants)
    return same <= {queries.dtype} and queries.dtype in DTYPES and queries.shape[1] % PANEL == 0 and fixed


class Constants(NamedTuple):
    targets: Tensor
    row_users: Tensor | None
    history_bits: Tensor | None
    column: Tensor | None  # [V]: log m - log p
    multiplicity: Tensor | None  # [V]: log m


class _Arguments(ctypes.Structure):
    """`Loss` of cpp/cross_entropy.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "items", "width", "words")),
        *((name, ctypes.c_void_p) for name in ("queries", "vectors", "targets", "row_users", "history_bits")),
        *((name, ctypes.c_void_p) for name in ("column", "multiplicity", "probabilities", "losses", "upstream")),
        *((name, ctypes.c_void_p) for name in ("of_queries", "of_vectors")),
    ]


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, constants: Constants, queries: Tensor, items: Tensor) -> Tensor:
        queries, items, memory = queries.contiguous(), items.contiguous(), Memory()
        losses = queries.new_empty(len(queries))
        wide = -(-len(items) // PANEL) * PANEL
        probabilities = memory.empty(queries.dtype, len(queries), wide)
        forward, own_rows = library(queries.dtype).loss_forward, shares(len(queries), MOST_WORKERS)
        parts = [arguments(constants, queries, items, probabilities, losses, rows) for rows in own_rows]
        share_out(forward, parts, queries.dtype)
        ctx.constants, ctx.memory, ctx.shares, ctx.parts = constants, memory, own_rows, parts
        ctx.save_for_backward(queries, items)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[None, Tensor, Tensor]:
        queries, items = ctx.saved_tensors
        upstream, of_queries = upstream.contiguous(), torch.empty_like(queries)
        of_items = [torch.empty_like(items) for _ in ctx.parts]
        parts = [_Arguments.from_buffer_copy(part) for part in ctx.parts]
        for (start, _), part, own in zip(ctx.shares, parts, of_items, strict=True):
            part.upstream, part.of_queries = upstream[start:].data_ptr(), of_queries[start:].data_ptr()
            part.of_vectors = own.data_ptr()
        backward = library(queries.dtype).loss_backward
        share_out(backward, parts, queries.dtype)
        return None, of_queries, *add_up([of_items])


def arguments(
    constants: Constants, queries: Tensor, items: Tensor, probabilities: Tensor, losses: Tensor, part: tuple[int, int]
) -> _Arguments:
    start, count = part
    users, bits = constants.row_users, constants.history_bits
    return _Arguments(
        rows=count,
        items=len(items),
        width=items.shape[1],
        words=0 if bits is None else bits.shape[1],
        queries=queries[start:].data_ptr(),
        vectors=items.data_ptr(),
        targets=constants.targets[start:].data_ptr(),
        row_users=None if users is None else users[start:].data_ptr(),
        history_bits=None if bits is None else bits.data_ptr(),
        column=None if constants.column is None else constants.column.data_ptr(),
        multiplicity=None if constants.multiplicity is None else constants.multiplicity.data_ptr(),
        probabilities=probabilities[start:].data_ptr(),
        losses=losses[start:].data_ptr(),
    )
