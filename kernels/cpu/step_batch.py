"""Check a batch before a C++ step reads it: most calls use its indices without a check."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import RecommenderBatch, RecommenderWeights
from .step_tensors import check_tensor, dtype_name


def check_step_batch(batch: RecommenderBatch, weights: RecommenderWeights, shared: bool) -> None:
    """Raise ValueError unless a batch has the shapes and dtypes of `RecommenderBatch` and its indices are in range.

    The states must fit the towers of the weights, and their last dimension must be contiguous. All other tensors
    must be contiguous. All must be on a CPU. shared: whether the batch must be a rank's share, which has a block.
    """
    items, rows, users = len(batch.distinct), len(batch.targets), len(batch.history_bits)
    if not items or not rows:
        raise ValueError(f"batch: expected at least one item and one row, found {items} and {rows}")
    if shared == (batch.block is None):
        raise ValueError(f"batch.block: expected {'one' if shared else 'none'}, found {batch.block}")
    if batch.block is not None and not 0 <= batch.block.start < batch.block.stop <= items:
        raise ValueError(f"batch.block: expected at least one of {items} items, found {batch.block}")
    _check_states(batch, weights)
    length = batch.grid.length
    positions = len(weights.sequence.tensors[0])
    if not 1 <= length <= positions:
        raise ValueError(f"batch.grid.length: expected 1 to {positions}, found {length}")
    words = max(batch.history_bits.shape[1], -(-items // 32))
    check_tensor("batch.multiplicity", batch.multiplicity, torch.int64, (items,))
    check_tensor("batch.row_weights", batch.row_weights, torch.float64, (rows,))
    check_tensor("batch.log_popularity", batch.log_popularity, torch.float64, (len(batch.log_popularity),))
    check_tensor("batch.history_bits", batch.history_bits, torch.int32, (users, words))
    if batch.dropout is not None:
        check_tensor("batch.dropout.users", batch.dropout.users, torch.int64, (users,))
    for name, indices, count, limit in (
        ("distinct", batch.distinct, items, len(batch.log_popularity)),
        ("inputs", batch.inputs, rows, items),
        ("targets", batch.targets, rows, items),
        ("row_users", batch.row_users, rows, users),
        ("grid.slots", batch.grid.slots, rows, users * length),
    ):
        _check_indices(name, indices, count, limit)


def _check_states(batch: RecommenderBatch, weights: RecommenderWeights) -> None:
    """Raise ValueError if states do not fit the towers, or a row number is not in its table."""
    (layers, _, width) = weights.towers[0].down_weight.shape
    items = batch.encoded
    kind = batch.states[0].table.dtype
    views = 1 + max(max(tower.views) for tower in weights.towers)
    if len(batch.states) < views:
        raise ValueError(f"batch.states: expected {views} views, found {len(batch.states)}")
    if kind not in (weights.fusion.dtype, torch.bfloat16):
        expected = f"{dtype_name(weights.fusion.dtype)} or bfloat16"
        raise ValueError(f"batch.states: expected {expected}, found {dtype_name(kind)}")
    for i, (table, rows) in enumerate(batch.states):
        if table.dtype != kind or table.shape[1:] != (layers, width):
            expected = f"[., {layers}, {width}] of {dtype_name(kind)}"
            raise ValueError(
                f"batch.states[{i}]: expected {expected}, found {list(table.shape)} of {dtype_name(table.dtype)}"
            )
        if not table.is_cpu or table.stride(2) != 1 or table.requires_grad:
            raise ValueError(f"batch.states[{i}]: expected rows in one piece on a CPU, without a gradient")
        if rows is not None:
            _check_indices(f"states[{i}].rows", rows, items, len(table))
        elif len(table) != items:
            raise ValueError(f"batch.states[{i}]: expected the {items} items of the batch, found {len(table)}")


def _check_indices(name: str, indices: Tensor, count: int, limit: int) -> None:
    """Raise ValueError unless these are `count` int64 indices from 0 to below `limit`."""
    check_tensor(f"batch.{name}", indices, torch.int64, (count,))
    least, most = map(int, indices.aminmax())
    if least < 0 or most >= limit:
        raise ValueError(f"batch.{name}: expected indices from 0 to {limit - 1}, found {least if least < 0 else most}")
