"""Checks of the ops' arguments: each raises ValueError with one line that names the argument, expected and found.

The values of tensors on a GPU are not checked, because reading them would wait for the GPU. Whoever copies indices to
a GPU checks them on the host first, by `check_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference.side_towers import ACTIVATION_FUNCTIONS
from .types import (
    BLOCK_WEIGHTS,
    OUTER_WEIGHTS,
    AdamState,
    AddedScores,
    Chain,
    SequenceDropout,
    SequenceGrid,
    SequenceWeights,
    States,
    Tower,
)

MOST_TOWERS = 32


def check_towers(
    states: Sequence[States], towers: Sequence[Tower], activation: str, projections: Sequence[Tensor] | None
) -> None:
    """Raise ValueError unless the arguments of `side_towers` have the shapes, dtypes and devices of its docstring."""
    if activation not in ACTIVATION_FUNCTIONS:
        raise ValueError(f"activation: expected {' or '.join(ACTIVATION_FUNCTIONS)}, found {activation!r}")
    if len(states) not in (1, 2):
        raise ValueError(f"states: expected one or two views, found {len(states)}")
    if not 1 <= len(towers) <= MOST_TOWERS:
        raise ValueError(f"towers: expected 1 to {MOST_TOWERS}, found {len(towers)}")
    layers, bottleneck, width = _dimensions("towers[0].down_weight", towers[0].down_weight, 3)
    if not layers * bottleneck * width:
        raise ValueError(f"towers[0].down_weight: expected no empty dimension, found {[layers, bottleneck, width]}")
    device = states[0].table.device
    dtype = towers[0].down_weight.dtype
    count = None
    for i, (table, rows) in enumerate(states):
        _floating(f"states[{i}].table", table)
        _same_device(f"states[{i}].table", table, device)
        if _dimensions(f"states[{i}].table", table, 3)[1:] != (layers, width):
            raise ValueError(f"states[{i}].table: expected [rows, {layers}, {width}], found {list(table.shape)}")
        if rows is not None:
            if i == 0 or rows is not states[0].rows or len(table) != len(states[0].table):  # equal rows once
                check_indices(f"states[{i}].rows", rows, None, len(table), device)
            if table.requires_grad:
                raise ValueError(f"states[{i}].table: no gradient flows to states read by row; pass them in order")
        items = len(table) if rows is None else len(rows)
        if count is not None and items != count:
            raise ValueError(f"states[{i}]: expected {count} items as in states[0], found {items}")
        count = items
    shapes = [
        (layers,),
        (layers, bottleneck, width),
        (layers, bottleneck),
        (layers, width, bottleneck),
        (layers, width),
    ]
    for i, tower in enumerate(towers):
        if tower.views not in ((0,), (1,), (0, 1)) or max(tower.views) >= len(states):
            raise ValueError(f"towers[{i}].views: expected (0,), (1,) or (0, 1) of {len(states)}, found {tower.views}")
        if (tower.gate is None) != (towers[0].gate is None):
            raise ValueError(f"towers[{i}].gate: expected gates in all towers or none")
        for name, value, shape in zip(Tower._fields[1:], tower[1:], shapes):
            if name == "gate" and value is None:
                continue
            if value is None:
                raise ValueError(f"towers[{i}].{name}: expected {list(shape)}, found None")
            _shaped(f"towers[{i}].{name}", value, shape)
            _floating(f"towers[{i}].{name}", value)
            _same_device(f"towers[{i}].{name}", value, device)
            if value.dtype != dtype:
                raise ValueError(f"towers[{i}].{name}: expected {_name(dtype)}, found {_name(value.dtype)}")
    if projections is None:
        return
    if len(projections) != len(towers):
        raise ValueError(f"projections: expected {len(towers)}, one a tower, found {len(projections)}")
    for i, projection in enumerate(projections):
        if _dimensions(f"projections[{i}]", projection, 2)[1] != width:
            raise ValueError(f"projections[{i}]: expected [d, {width}], found {list(projection.shape)}")
        _same_device(f"projections[{i}]", projection, device)
        if projection.dtype != dtype:
            raise ValueError(f"projections[{i}]: expected {_name(dtype)}, found {_name(projection.dtype)}")


def check_chains(chains: Sequence[Chain]) -> None:
    """Raise ValueError unless the maps of each chain can be multiplied, their biases fit and all are on one device."""
    for i, chain in enumerate(chains):
        shapes = [list(weight.shape) for weight in (chain.outer, chain.middle, chain.inner)]
        if any(len(shape) != 2 for shape in shapes) or any(a[1] != b[0] for a, b in zip(shapes, shapes[1:])):
            raise ValueError(f"chains[{i}]: expected matrices that can be multiplied, found {shapes}")
        for name, weight in (("middle", chain.middle), ("inner", chain.inner)):
            _shaped(f"chains[{i}].{name}_bias", getattr(chain, f"{name}_bias"), (len(weight),))
        for name, weight in chain._asdict().items():
            _same_device(f"chains[{i}].{name}", weight, chains[0].outer.device)


def check_sequences(
    x: Tensor, weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout | None = None
) -> None:
    """Raise ValueError unless x, weights, grid and dropout fit together in shapes, dtypes, devices and index ranges."""
    count = len(weights.tensors)
    if count < OUTER_WEIGHTS or (count - OUTER_WEIGHTS) % BLOCK_WEIGHTS:
        raise ValueError(
            f"weights.tensors: expected {OUTER_WEIGHTS} tensors and {BLOCK_WEIGHTS} more a block, found {count}"
        )
    positions, width = _dimensions("weights.tensors[0]", weights.tensors[0], 2)
    if x.dim() != 2 or tuple(x.shape) != (len(grid.slots), width):
        raise ValueError(f"x: expected {[len(grid.slots), width]}, found {list(x.shape)}")
    if width % weights.heads:
        raise ValueError(f"weights.heads: expected a divisor of {width}, found {weights.heads}")
    if not 1 <= grid.length <= positions:
        raise ValueError(f"grid.length: expected 1 to {positions}, found {grid.length}")
    if others := {_name(weight.dtype) for weight in weights.tensors} - {_name(x.dtype)}:
        raise ValueError(f"weights: expected {_name(x.dtype)} like x, found {', '.join(sorted(others))}")
    for i, weight in enumerate(weights.tensors):
        _same_device(f"weights.tensors[{i}]", weight, x.device)
    check_indices("grid.slots", grid.slots, len(x), grid.users * grid.length, x.device)
    if dropout is not None:
        if dropout.users.dtype != torch.int64:
            raise ValueError(f"dropout.users: expected int64, found {_name(dropout.users.dtype)}")
        _shaped("dropout.users", dropout.users, (grid.users,))
        _same_device("dropout.users", dropout.users, x.device)


def check_moments(states: Sequence[AdamState]) -> None:
    """Raise ValueError unless both moments have the shape of their parameter and steps holds one number."""
    for i, state in enumerate(states):
        for name in ("mean", "square"):
            _shaped(f"states[{i}].{name}", getattr(state, name), tuple(state.parameter.shape))
        if state.steps.numel() != 1:
            raise ValueError(f"states[{i}].steps: expected one number, found {list(state.steps.shape)}")


def check_loss(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None,
    history_bits: Tensor | None,
    log_multiplicity: Tensor | None,
    log_popularity: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `inbatch_cross_entropy` have the shapes and dtypes of its docstring."""
    columns, rows = _matrices(queries, items)
    check_indices("targets", targets, rows, columns, items.device)
    for name, values in (("log_multiplicity", log_multiplicity), ("log_popularity", log_popularity)):
        if values is not None:
            _shaped(name, values, (columns,))
            _floating(name, values)
            _same_device(name, values, items.device)
    if (row_users is None) != (history_bits is None):
        raise ValueError("row_users, history_bits: expected both or neither")
    if history_bits is not None:
        users, words = _dimensions("history_bits", history_bits, 2)
        if history_bits.dtype != torch.int32:
            raise ValueError(f"history_bits: expected int32, found {_name(history_bits.dtype)}")
        if words * 32 < columns:
            raise ValueError(
                f"history_bits: expected at least {-(-columns // 32)} words for {columns} items, found {words}"
            )
        _same_device("history_bits", history_bits, items.device)
        check_indices("row_users", row_users, rows, users, items.device)


def check_ranks(
    queries: Tensor, items: Tensor, targets: Tensor, excluded: Tensor, added: AddedScores | None = None
) -> None:
    """Raise ValueError unless the arguments of `target_rank` have the shapes and dtypes of its docstring."""
    catalogue, users = _matrices(queries, items)
    check_indices("targets", targets, users, catalogue, items.device)
    if _dimensions("excluded", excluded, 2)[0] != users:
        raise ValueError(f"excluded: expected {users} rows, found {len(excluded)}")
    check_indices("excluded", excluded, None, catalogue, items.device, lowest=-1)
    if added is not None:
        _check_added(added, queries, catalogue)


def check_top(
    queries: Tensor,
    items: Tensor,
    count: int,
    excluded: Tensor,
    allowed: Tensor | None = None,
    added: AddedScores | None = None,
) -> None:
    """Raise ValueError unless the arguments of `top_items` have the shapes and dtypes of its docstring."""
    catalogue, users = _matrices(queries, items)
    if type(count) is not int or count < 1:
        raise ValueError(f"count: expected a whole number from 1, found {count!r}")
    if _dimensions("excluded", excluded, 2)[0] != users:
        raise ValueError(f"excluded: expected {users} rows, found {len(excluded)}")
    check_indices("excluded", excluded, None, catalogue, items.device, lowest=-1)
    if allowed is not None:
        if allowed.dtype != torch.bool:
            raise ValueError(f"allowed: expected bool, found {_name(allowed.dtype)}")
        _shaped("allowed", allowed, (catalogue,))
        _same_device("allowed", allowed, items.device)
    if added is not None:
        _check_added(added, queries, catalogue)


def _check_added(added: AddedScores, queries: Tensor, catalogue: int) -> None:
    """Raise ValueError unless these are entries of the users of `queries` [U, d] and of a catalogue's items.

    Like the values of other indices, the order of offsets and items is checked only on a CPU.
    """
    (entries,) = _dimensions("added.items", added.items, 1)
    check_indices("added.offsets", added.offsets, len(queries) + 1, entries + 1, queries.device)
    check_indices("added.items", added.items, entries, catalogue, queries.device)
    _shaped("added.values", added.values, (entries,))
    _same_device("added.values", added.values, queries.device)
    if added.values.dtype != queries.dtype:
        raise ValueError(
            f"added.values: expected {_name(queries.dtype)} like queries, found {_name(added.values.dtype)}"
        )
    if not queries.is_cpu or torch.compiler.is_compiling():
        return
    first, last = int(added.offsets[0]), int(added.offsets[-1])
    if (first, last) != (0, entries):
        raise ValueError(f"added.offsets: expected offsets from 0 to {entries}, found {first} to {last}")
    if (added.offsets.diff() < 0).any():
        raise ValueError("added.offsets: expected ascending offsets, found a smaller one after a larger one")
    follows = added.items[1:] > added.items[:-1]
    starts = added.offsets[1:-1]
    follows[starts[(starts > 0) & (starts < entries)] - 1] = True  # the next entry is another user's
    if not follows.all():
        entry = int((~follows).nonzero()[0]) + 1
        raise ValueError(
            "added.items: expected ascending items without repeats for each user, "
            f"found {int(added.items[entry])} after {int(added.items[entry - 1])}"
        )


def check_indices(
    name: str, indices: Tensor, count: int | None, limit: int, device: torch.device, lowest: int = 0
) -> None:
    """Raise ValueError unless these are int64 indices on a device, at least `lowest` and below `limit`.

    Args:
        name: name of the argument, for the message.
        indices: the indices, of any shape.
        count: expects the shape [count]; None for any shape.
        limit: the first index that is too large.
        device: the device where they must be.
        lowest: the smallest allowed index.

    Values are checked only on a CPU, and not while torch.compile traces.
    """
    if indices.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, found {_name(indices.dtype)}")
    if count is not None:
        _shaped(name, indices, (count,))
    _same_device(name, indices, device)
    if indices.is_cpu and indices.numel() and not torch.compiler.is_compiling():
        least, most = (bound.item() for bound in indices.aminmax())
        if least < lowest or most >= limit:
            outside = least if least < lowest else most
            raise ValueError(f"{name}: expected indices from {lowest} to {limit - 1}, found {outside}")


def _matrices(queries: Tensor, items: Tensor) -> tuple[int, int]:
    """Return (rows of items, rows of queries). Raises ValueError unless they share width, dtype and device."""
    count, width = _dimensions("items", items, 2)
    rows, query_width = _dimensions("queries", queries, 2)
    if not width:
        raise ValueError(f"items: expected vectors of at least one number, found {list(items.shape)}")
    if query_width != width:
        raise ValueError(f"queries: expected [rows, {width}] as items are wide, found {list(queries.shape)}")
    _floating("items", items)
    if queries.dtype != items.dtype:
        raise ValueError(f"queries: expected {_name(items.dtype)} like items, found {_name(queries.dtype)}")
    _same_device("queries", queries, items.device)
    return count, rows


def _dimensions(name: str, tensor: Tensor, count: int) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises ValueError unless it has `count` dimensions."""
    if tensor.dim() != count:
        raise ValueError(f"{name}: expected {count} dimensions, found {list(tensor.shape)}")
    return tuple(tensor.shape)


def _shaped(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError, with the argument's name, unless a tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")


def _floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError, with the argument's name, unless a tensor's dtype is a floating-point one."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, found {_name(tensor.dtype)}")


def _same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError, with the argument's name, unless a tensor is on this device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, found {tensor.device}")


def _name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
