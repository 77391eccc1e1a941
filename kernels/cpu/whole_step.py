"""A side-network recommender's loss and all of its gradients on a CPU, in three calls of the C++.

This module says which weights and batches the C++ takes, and keeps memory from step to step; `whole_step_plan.py` has
the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from ..types import RecommenderBatch, RecommenderWeights
from . import fold_heads, sequence_encoder
from .library import DTYPES
from .whole_step_plan import StepPlan


class RecommenderGradients:
    """The op for one model, with its memory from step to step."""

    def __init__(self) -> None:
        self._plan: StepPlan | None = None
        self._marks: list[list] = []  # of the weights that were looked at last
        self._is_taken = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy of a model begins without memory

    def takes(self, weights: RecommenderWeights, batch: RecommenderBatch) -> bool:
        """Return True if the C++ takes the weights and the batch, and they fit together.

        What it refuses is left to the single ops, to compute or to name.
        """
        marks = _marks(weights)
        if marks != self._marks:
            self._marks, self._is_taken = marks, _takes(weights)
        return self._is_taken and _fits(batch, weights)

    def __call__(
        self, weights: RecommenderWeights, batch: RecommenderBatch, on_loss: Callable[[Tensor], None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, a scalar, and the gradients of the weights in their order; the next call may overwrite them.

        For what `takes` has just accepted, one thread at a time. `on_loss` is called with the loss while the gradients
        are under way.
        """
        plan, least = self._plan, (0, 0)
        known = plan is not None and plan.is_of(self._marks, batch)
        if known and not plan.has_room(batch):
            known, least = False, (plan.items, plan.rows)
        if not known:
            self._plan = plan = None  # memory goes before there is more, but for gradients in use
            self._plan = plan = StepPlan(weights, batch, self._marks, least)
        return plan.run(batch, on_loss), plan.gradients

    def forget(self) -> None:
        """Give the memory back."""
        self._plan = None


def _marks(weights: RecommenderWeights) -> list[list]:
    """Return what differs once a weight has other memory, as after `module.to`, another shape or another setting."""
    tensors, sequence = weights.tensors(), weights.sequence
    towers = [(tower.views, tower.gate is None) for tower in weights.towers]
    others = [weights.activation, sequence.heads, sequence.epsilon, *towers]
    marks = Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype")
    return [others, *(list(map(mark, tensors)) for mark in marks)]


def _takes(weights: RecommenderWeights) -> bool:
    """Return True for weights of one dtype on a CPU, in widths that each op takes."""
    dtype, d = weights.fusion.dtype, len(weights.fusion)
    layers, bottleneck, width = weights.towers[0].down_weight.shape
    gate = [] if weights.towers[0].gate is None else [(layers,)]
    of_tower = [*gate, (layers, bottleneck, width), (layers, bottleneck), (layers, width, bottleneck), (layers, width)]
    between, chains = weights.fusion.shape[1] // len(weights.towers), weights.chains()
    return (
        dtype in DTYPES
        and all(_is_plain(tensor, dtype, tensor.shape) for tensor in weights.tensors())
        and all([weight.shape for weight in tower[1:] if weight is not None] == of_tower for tower in weights.towers)
        and len(weights.heads) == len(weights.towers)
        and weights.fusion.shape[1] == between * len(weights.towers)
        and weights.fusion_bias.shape == (d,)
        and all(chain.middle.shape == (between, len(chain.inner)) for chain in chains)
        and all(chain.inner.shape[1] == width for chain in chains)
        and all(len(chain.middle_bias) == between and len(chain.inner_bias) == len(chain.inner) for chain in chains)
        and not fold_heads.refusal(chains)
        and weights.sequence.tensors[0].shape[1] == d
        and d % weights.sequence.heads == 0
        and not sequence_encoder.refusal(weights.sequence)
    )


def _fits(batch: RecommenderBatch, weights: RecommenderWeights) -> bool:
    """Return True if a batch fits these weights, and its indices are in their ranges."""
    items, rows, users = len(batch.distinct), len(batch.targets), len(batch.history_bits)
    (layers, _, width), kind = weights.towers[0].down_weight.shape, batch.states[0].table.dtype
    tables, read = [view.table for view in batch.states], [view for view in batch.states if view.rows is not None]
    by_number = [len(batch.log_popularity), *(len(table) for table, numbers in read if numbers is batch.distinct)]
    words, length = batch.history_bits.shape[1], batch.grid.length
    return (
        rows > 0
        and max(max(tower.views) for tower in weights.towers) < len(tables)
        and kind in (weights.fusion.dtype, torch.bfloat16)
        and all(table.dtype == kind and table.shape[1:] == (layers, width) for table in tables)
        and all(table.is_cpu and table.stride(2) == 1 and not table.requires_grad for table in tables)
        and all(len(table if numbers is None else numbers) == items for table, numbers in batch.states)
        and _are_within(batch.distinct, items, min(by_number))
        and all(_are_within(numbers, items, len(table)) for table, numbers in read if numbers is not batch.distinct)
        and all(_are_within(indices, rows, items) for indices in (batch.inputs, batch.targets))
        and _are_within(batch.row_users, rows, users)
        and _are_within(batch.grid.slots, rows, users * length)
        and 1 <= length <= len(weights.sequence.tensors[0])
        and _is_plain(batch.multiplicity, torch.int64, (items,))
        and _is_plain(batch.row_weights, torch.float64, (rows,))
        and _is_plain(batch.log_popularity, torch.float64, (len(batch.log_popularity),))
        and _is_plain(batch.history_bits, torch.int32, (users, words))
        and words * 32 >= items
        and (batch.dropout is None or _is_plain(batch.dropout.users, torch.int64, (users,)))
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Return True if C++ may read such numbers at the tensor's address."""
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()


def _are_within(indices: Tensor, count: int, limit: int) -> bool:
    """Return True for `count` int64, from 0 to below a limit."""
    if not _is_plain(indices, torch.int64, (count,)):
        return False
    least, most = indices.aminmax()
    return int(least) >= 0 and int(most) < limit
