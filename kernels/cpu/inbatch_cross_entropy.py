"""The debiased in-batch cross-entropy on a CPU in C++ (`cpp/cross_entropy.cpp`); the cores divide the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import shares
from .batch_panels import BatchCalls
from .library import DTYPES, PANEL, library
from .schedule import share_out
from .step_calls import Output, StepCalls
from .step_memory import Memory
from .structs import LossStruct
from .sums import add_up

MOST_WORKERS = 4  # each worker writes a gradient of all items, and these are added up


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> Tensor:
    """Return the loss of each row [R], differentiable once in queries and items; `refusal` must return ""."""
    column = log_multiplicity
    if log_popularity is not None:
        column = -log_popularity if column is None else column - log_popularity
    constants = (targets, row_users, history_bits, column, log_multiplicity)
    constants = LossConstants(*(None if tensor is None else tensor.contiguous() for tensor in constants))
    return RowLossesFunction.apply(constants, queries, items)


def refusal(queries: Tensor, items: Tensor, *constants: Tensor | None) -> str:
    """Return why the C++ cannot take these tensors, or ""; constants: log multiplicity and log popularity."""
    constants = tuple(tensor for tensor in constants if tensor is not None)
    dtypes = {tensor.dtype for tensor in (queries, items, *constants)}
    if len(dtypes) != 1 or queries.dtype not in DTYPES:
        return "it needs tensors of one dtype, float32 or float64"
    if queries.shape[1] % PANEL:
        return f"it needs a width that is a multiple of {PANEL}, found {queries.shape[1]}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constants):
        return "it has no gradient for log_multiplicity and log_popularity"
    return ""


class LossConstants(NamedTuple):
    """The arguments of the loss that have no gradient; all are contiguous."""

    targets: Tensor  # int64 [R]
    row_users: Tensor | None  # int64 [R]
    history_bits: Tensor | None  # int32 [users, words]
    column: Tensor | None  # [V]: log m - log p
    multiplicity: Tensor | None  # [V]: log m


class RowLossesFunction(torch.autograd.Function):
    """The autograd function of `inbatch_cross_entropy`."""

    @staticmethod
    def forward(ctx, constants: LossConstants, queries: Tensor, items: Tensor) -> Tensor:
        """Return the losses [R]; the probabilities of all items stay in memory for the backward."""
        queries, items, memory = queries.contiguous(), items.contiguous(), Memory()
        losses = queries.new_empty(len(queries))
        wide = -(-len(items) // PANEL) * PANEL
        probabilities = memory.empty(queries.dtype, len(queries), wide)
        row_shares = shares(len(queries), MOST_WORKERS)
        parts = [loss_struct(constants, queries, items, probabilities, losses, rows) for rows in row_shares]
        share_out(library(queries.dtype).loss_forward, parts, queries.dtype)
        ctx.constants = constants
        ctx.memory = memory
        ctx.shares = row_shares
        ctx.parts = parts
        ctx.save_for_backward(queries, items)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[None, Tensor, Tensor]:
        """Return the gradients of queries [R, d] and items [V, d] from those of the losses [R]."""
        queries, items = ctx.saved_tensors
        upstream, of_queries = upstream.contiguous(), torch.empty_like(queries)
        of_items = [torch.empty_like(items) for _ in ctx.parts]
        parts = [LossStruct.from_buffer_copy(part) for part in ctx.parts]
        for (start, _), part, of_vectors in zip(ctx.shares, parts, of_items, strict=True):
            part.upstream = upstream[start:].data_ptr()
            part.of_queries = of_queries[start:].data_ptr()
            part.of_vectors = of_vectors.data_ptr()
        share_out(library(queries.dtype).loss_backward, parts, queries.dtype)
        return None, of_queries, *add_up([of_items])


def loss_struct(
    constants: LossConstants,
    queries: Tensor,
    items: Tensor,
    probabilities: Tensor,
    losses: Tensor,
    part: tuple[int, int],
) -> LossStruct:
    """Return a C++ call on a part (start, length) of the rows.

    Args: queries [R, d], items [V, d], probabilities [R, V rounded up to 16] and losses [R] are contiguous; the forward
    writes the last two.
    """
    start, count = part
    users = constants.row_users
    bits = constants.history_bits
    return LossStruct(
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


class InbatchCrossEntropyCalls:
    """The op as a pair of a step. Each worker takes a part of the rows and writes its part of the items' gradient.

    Attributes: losses [rows]; of_states [rows, d]; of_vectors, for each worker [items, d].
    """

    def __init__(self, calls: StepCalls, batch: BatchCalls, states: Output, vectors: Output) -> None:
        """Allocate the memory; states [rows, d]: the sequence encoder's; vectors [items, d]: the item vectors."""
        self._calls = calls
        self._batch = batch
        self._states = states
        self._vectors = vectors
        d = vectors.tensor.shape[1]
        wide = -(-calls.items // PANEL) * PANEL
        self._probabilities = calls.empty(calls.rows * wide)
        self.losses = Output(calls.empty(calls.rows))
        self.of_states = Output(calls.empty(calls.rows, d))
        self.of_vectors = calls.empty(MOST_WORKERS, calls.items, d).unbind()  # one for each worker
        self._working: list[LossStruct] = []

    @property
    def workers(self) -> int:
        """Return the number of workers for the current batch, known once `forward` has been called."""
        return len(self._working)

    def forward(self) -> None:
        """Schedule the loss of each row."""
        self._cut()
        ready = self._states.done.to(self._vectors.done).to(self._batch.done)
        self.losses.done = self._calls.add("loss_forward", self._working, ready)

    def backward(self) -> None:
        """Schedule the gradients of the states, and each worker's part of those of the item vectors."""
        self.of_states.done = self._calls.add("loss_backward", self._working, self.losses.done)

    def _cut(self) -> None:
        """Divide the current batch's rows among the workers and set their calls."""
        batch = self._calls.batch
        constants = self._batch
        items, rows = len(batch.distinct), len(batch.targets)
        of_rows = batch.targets, batch.row_users, batch.history_bits
        loss_constants = LossConstants(*of_rows, constants.column, constants.log_multiplicity)
        probabilities = self._probabilities[: rows * (-(-items // PANEL) * PANEL)].view(rows, -1)
        queries, vectors = self._states.tensor[:rows], self._vectors.tensor[:items]
        self._working = []
        for worker, part in enumerate(shares(rows, MOST_WORKERS)):
            struct = loss_struct(loss_constants, queries, vectors, probabilities, self.losses.tensor, part)
            struct.upstream = constants.of_row_losses[part[0] :].data_ptr()
            struct.of_queries = self.of_states.tensor[part[0] :].data_ptr()
            struct.of_vectors = self.of_vectors[worker].data_ptr()
            self._working.append(struct)
