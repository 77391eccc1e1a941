"""A side-network recommender's loss and all of its gradients on a CPU, in three calls of the C++: what it knows, and
what it keeps from step to step; `recommender_plan.py` has the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from . import fold_heads as fold_native
from . import sequence_encoder as sequence_encoder_native
from .library import DTYPES
from .whole_step_plan import Plan, RecommenderBatch, RecommenderWeights


class RecommenderGradients:
    """The op for one model, with the memory that it keeps from step to step."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._marks: list[list] = []  # of the weights that were looked at last
        self._known = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy of a model begins without memory

    def takes(self, weights: RecommenderWeights, batch: RecommenderBatch) -> bool:
        """Whether the C++ knows the weights and the batch, and they fit together; what it refuses is left to the single
        ops, to compute or to name."""
        marks = _marks(weights)
        if marks != self._marks:
            self._marks, self._known = marks, _knows(weights)
        return self._known and _fits(batch, weights)

    def __call__(
        self, weights: RecommenderWeights, batch: RecommenderBatch, told: Callable[[Tensor], None]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, a scalar, and the gradient of each of the weights, in their order, which the next call may
        overwrite; for what `takes` has just accepted, one thread at a time. `told` is called with the loss, the
        gradients being under way."""
        plan, least = self._plan, (0, 0)
        known = plan is not None and plan.is_of(self._marks, batch)
        if known and not plan.has_room(batch):
            known, least = False, (plan.items, plan.rows)
        if not known:
            self._plan = plan = None  # memory goes before there is more, but for gradients in use
            self._plan = plan = Plan(weights, batch, self._marks, least)
        return plan.run(batch, told), plan.gradients

    def forget(self) -> None:
        """Gives the memory back."""
        self._plan = None


def _marks(weights: RecommenderWeights) -> list[list]:
    """What is found anew where a weight was given other memory, as by `module.to`, or another form, and all that is no
    tensor."""
    tensors, sequence = weights.tensors(), weights.sequence
    towers = [(tower.views, tower.gate is None) for tower in weights.towers]
    others = [weights.activation, sequence.heads, sequence.epsilon, *towers]
    forms = Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype")
    return [others, *(list(map(form, tensors)) for form in forms)]


def _knows(weights: RecommenderWeights) -> bool:
    """Whether the C++ knows such weights: of one dtype on a CPU, and widths as each op asks for."""
    dtype, d = weights.fusion.dtype, len(weights.fusion)
    layers, bottleneck, width = weights.towers[0].down_weight.shape
    gate = [] if weights.towers[0].gate is None else [(layers,)]
    of_tower = [*gate, (layers, bottleneck, width), (layers, bottleneck), (layers, width, bottleneck), (layers, width)]
    between, chains = weights.fusion.shape[1] // len(weights.towers), weights.chains()
    return (
        dtype in DTYPES
        and all(_plain(each, dtype, each.shape) for each in weights.tensors())
        and all([each.shape for each in tower[1:] if each is not None] == of_tower for tower in weights.towers)
        and len(weights.heads) == len(weights.towers)
        and weights.fusion.shape[1] == between * len(weights.towers)
        and weights.fusion_bias.shape == (d,)
        and all(chain.middle.shape == (between, len(chain.inner)) for chain in chains)
        and all(chain.inner.shape[1] == width for chain in chains)
        and all(len(chain.middle_bias) == between and len(chain.inner_bias) == len(chain.inner) for chain in chains)
        and fold_native.takes(chains)
        and weights.sequence.tensors[0].shape[1] == d
        and d % weights.sequence.heads == 0
        and sequence_encoder_native.takes(weights.sequence)
    )


def _fits(batch: RecommenderBatch, weights: RecommenderWeights) -> bool:
    """Whether these weights take such a batch, whose indices are in their ranges."""
    items, rows, users = len(batch.distinct), len(batch.targets), len(batch.history_bits)
    (layers, _, width), kind = weights.towers[0].down_weight.shape, batch.states[0].table.dtype
    tables, read = [view.table for view in batch.states], [view for view in batch.states if view.rows is not None]
    by_number = [len(batch.log_popularity), *(len(table) for table, own in read if own is batch.distinct)]
    words, length = batch.history_bits.shape[1], batch.grid.length
    return (
        rows > 0
        and max(max(tower.views) for tower in weights.towers) < len(tables)
        and kind in (weights.fusion.dtype, torch.bfloat16)
        and all(table.dtype == kind and table.shape[1:] == (layers, width) for table in tables)
        and all(table.is_cpu and table.stride(2) == 1 and not table.requires_grad for table in tables)
        and all(len(table if own is None else own) == items for table, own in batch.states)
        and _within(batch.distinct, items, min(by_number))
        and all(_within(own, items, len(table)) for table, own in read if own is not batch.distinct)
        and all(_within(own, rows, items) for own in (batch.inputs, batch.targets))
        and _within(batch.row_users, rows, users)
        and _within(batch.grid.slots, rows, users * length)
        and 1 <= length <= len(weights.sequence.tensors[0])
        and _plain(batch.multiplicity, torch.int64, (items,))
        and _plain(batch.row_weights, torch.float64, (rows,))
        and _plain(batch.log_popularity, torch.float64, (len(batch.log_popularity),))
        and _plain(batch.history_bits, torch.int32, (users, words))
        and words * 32 >= items
        and (batch.dropout is None or _plain(batch.dropout.users, torch.int64, (users,)))
    )


def _plain(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether the C++ finds such numbers where it looks."""
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()


def _within(indices: Tensor, count: int, limit: int) -> bool:
    """Whether there are so many int64, from 0 to below a limit."""
    if not _plain(indices, torch.int64, (count,)):
        return False
    least, most = indices.aminmax()
    return int(least) >= 0 and int(most) < limit
