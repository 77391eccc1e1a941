"""The side network's training on a CPU by C++: `cpp/side_network.cpp`, in pieces that stay in a core's cache.

The towers' items stand in one row, which is cut once a core: a tower that is left whole needs no adding up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import GATE_TEMPERATURE, States, Tower
from ..threads import at_once, cores, cut, equal_parts, shares
from .library import DTYPES, PANEL, library, run, share_out
from .side_towers_torch import PARAMETERS, Weights, composites, mixes
from .step_memory import Memory
from .sums import add_up

MOST_WORKERS = 16
LEAST_ROWS = 48  # of a worker: it reads all the weights of a tower, and writes as many gradients
MOST_UNTRAINED = 384  # items at a time where no backward follows, so that their states stay in the cache


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    *,
    projections: Sequence[Tensor],
) -> list[Tensor]:
    """`reference.side_towers` with projections, for weights of fp32 or fp64. The caller has checked the arguments. Not
    differentiable twice."""
    settings = _Settings(activation == "gelu", [tower.views for tower in towers], [view.rows for view in states])
    parameters = [*(parameter for tower in towers for parameter in tower[1:]), *projections]
    return list(_SideTowers.apply(settings, *(view.table for view in states), *parameters))


def takes(tower: Tower, projections: Sequence[Tensor] | None, trained: bool) -> bool:
    """Whether the C++ knows this dtype and, where no backward follows, this bottleneck."""
    whole = trained or tower.down_weight.shape[1] % PANEL == 0
    return projections is not None and tower.down_weight.dtype in DTYPES and whole


@torch.no_grad()
def encode(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    *,
    projections: Sequence[Tensor],
) -> list[Tensor]:
    """The same where no backward follows, some items at a time; bottlenecks in whole panels alone."""
    settings = _Settings(activation == "gelu", [tower.views for tower in towers], [view.rows for view in states])
    tables = [view.table for view in states]
    parameters = [*(parameter for tower in towers for parameter in tower[1:]), *projections]
    items = len(tables[0]) if settings.rows[0] is None else len(settings.rows[0])
    outputs = [projection.new_empty(items, len(projection)) for projection in projections]
    joined = [_joined(tower, projection) for tower, projection in zip(towers, projections)]
    encode_towers = library(parameters[1].dtype).side_encode

    def work(part: slice) -> None:
        chosen = [table[part] if rows is None else table for table, rows in zip(tables, settings.rows)]
        own_rows = [None if rows is None else rows[part] for rows in settings.rows]
        kept = _kept(settings._replace(rows=own_rows), chosen, parameters, memory := Memory(), trained=False)
        for own, weights, output in zip(kept, joined, outputs):
            more = {name: pointer(weight) for name, weight in weights.items()}
            piece = _Piece(0, 0, own.inputs.shape[2])
            run(encode_towers, own.call(piece, projected=pointer(output[part]), **more))
        del memory

    at_once(work, equal_parts(items, MOST_UNTRAINED))
    return outputs


class _Settings(NamedTuple):
    gelu: bool
    reads: list[tuple[int, ...]]  # the views of each tower
    rows: list[Tensor | None]  # of each view


class _Piece(NamedTuple):
    """Some items of a tower: one call of the library."""

    tower: int
    start: int
    count: int


class _Arguments(ctypes.Structure):
    """`Tower` of cpp/side_network.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "bottleneck", "width", "embedding")),
        *((name, ctypes.c_int32) for name in ("total", "start", "count", "views", "gelu", "half")),
        *((name, ctypes.c_void_p) for name in Tower._fields[1:]),
        ("projection", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("inputs", "before", "after", "projected", "upstream", "of_gate")),
        *((name, ctypes.c_void_p) for name in ("of_down_weight", "of_down_bias", "of_up_weight", "of_up_bias")),
        ("of_projection", ctypes.c_void_p),
        ("of_hidden", ctypes.c_void_p * 2),
        ("temperature", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("joined", "joined_bias")),
        *((name, ctypes.c_void_p) for name in ("joined_projection", "joined_projection_bias")),
    ]


class _Gather(ctypes.Structure):
    """`Gather` of cpp/side_network.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "rows", "panels")),
        *((name, ctypes.c_int64) for name in ("item", "layer")),
        *((name, ctypes.c_int32) for name in ("bytes", "layers", "width", "total", "start", "count")),
    ]


class _Kept(NamedTuple):
    """A tower's tensors, which its pointers point into."""

    gate: Tensor | None  # [K]
    down_weight: Tensor  # [K, R, D]
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    projection: Tensor  # [d, D]
    hidden: list[Tensor]  # of each view it reads: panels [K, ceil(D / 16), N, 16]
    inputs: Tensor  # panels [K, ceil(D / 16), N, 16]
    before: Tensor  # panels [K, ceil(R / 16), N, 16]
    after: Tensor  # the same memory after a ReLU
    arguments: _Arguments  # of no items yet

    def call(self, piece: _Piece, **more: Any) -> _Arguments:
        """What the library takes for some of its items."""
        found = _Arguments.from_buffer_copy(self.arguments)
        found.start, found.count = piece.start, piece.count
        for name, value in more.items():
            setattr(found, name, value)
        return found


class _SideTowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: _Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(settings.rows)
        tables, parameters = tensors[:count], tensors[count:]
        memory = Memory()
        kept = _kept(settings, tables, parameters, memory)
        split = any(ctx.needs_input_grad[1 : 1 + count])  # towers add to their views' gradients
        ctx.rounds = rounds(len(kept), kept[0].inputs.shape[2], split)
        dtype = parameters[1].dtype

        # Not kept for the backward: a node that held its own outputs would never be freed.
        projected = [each.inputs.new_empty(each.inputs.shape[2], len(each.projection)) for each in kept]
        for pieces in ctx.rounds:
            outputs = [pointer(projected[piece.tower]) for piece in pieces]
            calls = [kept[piece.tower].call(piece, projected=output) for piece, output in zip(pieces, outputs)]
            share_out(library(dtype).side_forward, calls, dtype)
        ctx.settings, ctx.kept, ctx.memory = settings, kept, memory
        ctx.save_for_backward(*parameters)  # alone to refuse parameters that were changed in between
        return tuple(projected)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        settings, kept, parameters = ctx.settings, ctx.kept, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1 : 1 + len(settings.rows)]
        layers, _, width = kept[0].down_weight.shape
        of_views = [upstream[0].new_zeros(kept[0].inputs.shape[2], layers, width) if want else None for want in wanted]
        upstream = [gradient.contiguous() for gradient in upstream]
        dtype, parts = parameters[1].dtype, [[] for _ in kept]
        for pieces in ctx.rounds:
            calls = []
            for piece in pieces:
                own = kept[piece.tower]
                gradients = _empty_gradients(own, gated=parameters[PARAMETERS * piece.tower] is not None)
                parts[piece.tower].append(gradients)
                more = {f"of_{name}": pointer(gradient) for name, gradient in gradients.items()}
                of_hidden = _pointers([of_views[view] for view in settings.reads[piece.tower]])
                more |= {"upstream": pointer(upstream[piece.tower]), "of_hidden": of_hidden}
                calls.append(own.call(piece, **more))
            share_out(library(dtype).side_backward, calls, dtype)
        add_up([[part[name] for part in own] for own in parts for name in own[0]])
        totals = [own[0] for own in parts]
        of_parameters = [total.get(name) for total in totals for name in Tower._fields[1:]]
        return None, *of_views, *of_parameters, *(total["projection"] for total in totals)


def _kept(
    settings: _Settings,
    tables: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    memory: Memory,
    trained: bool = True,
) -> list[_Kept]:
    """The towers' tensors, with the hidden states gathered in panels; by this thread alone where they are not
    trained, and then towers use the same memory and keep one layer's input."""
    views = _panels(tables, settings.rows, parameters[1].dtype, memory, trained)
    layers, bottleneck, width = parameters[1].shape
    items, first, found = views[0].shape[2], parameters[1], []
    towers, kept = (len(settings.reads), layers) if trained else (1, 1)
    inputs = memory.empty(first.dtype, towers, kept, panels_of(width), items, PANEL)
    before = memory.empty(first.dtype, towers, layers, panels_of(bottleneck), items, PANEL)
    after = memory.empty(first.dtype, *before.shape) if settings.gelu else before
    for i, reads in enumerate(settings.reads):
        own = (*parameters[PARAMETERS * i : PARAMETERS * (i + 1)], parameters[PARAMETERS * len(settings.reads) + i])
        own = [parameter if parameter is None else parameter.contiguous() for parameter in own]
        tensors = *own, [views[view] for view in reads], *(each[i % towers] for each in (inputs, before, after))
        found.append(_Kept(*tensors, arguments(settings.gelu, *tensors)))
    return found


def arguments(gelu: bool, gate: Tensor | None, *tensors: Tensor | list[Tensor]) -> _Arguments:
    """Of a tower's tensors, in the order of `_Kept`."""
    down_weight, down_bias, up_weight, up_bias, projection, hidden, inputs, before, after = tensors
    layers, bottleneck, width = down_weight.shape
    return _Arguments(
        layers=layers,
        bottleneck=bottleneck,
        width=width,
        embedding=len(projection),
        total=inputs.shape[2],
        views=len(hidden),
        gelu=gelu,
        half=hidden[0].dtype == torch.bfloat16,
        gate=pointer(gate),
        down_weight=pointer(down_weight),
        down_bias=pointer(down_bias),
        up_weight=pointer(up_weight),
        up_bias=pointer(up_bias),
        projection=pointer(projection),
        hidden=_pointers(hidden),
        inputs=pointer(inputs),
        before=pointer(before),
        after=pointer(after),
        temperature=GATE_TEMPERATURE,
    )


def _panels(
    tables: Sequence[Tensor], rows: Sequence[Tensor | None], dtype: torch.dtype, memory: Memory, shared: bool
) -> list[Tensor]:
    """Rows of each view as panels [K, ceil(D / 16), N, 16], all of them in bf16 or all in `dtype`; shared: the work is,
    among the cores."""
    kind = torch.bfloat16 if all(table.dtype == torch.bfloat16 for table in tables) else dtype
    views = []
    for table, own in zip(tables, rows):
        if table.dtype != kind or table.stride(2) != 1:
            table, own = (table if own is None else table.index_select(0, own)).to(kind).contiguous(), None
        views.append((table, None if own is None else own.contiguous()))
    items, (_, layers, width) = len(tables[0]) if rows[0] is None else len(rows[0]), tables[0].shape
    found = memory.empty(kind, len(views), layers, panels_of(width), items, PANEL).unbind()
    calls = gathers(views, found, shares(items) if shared else [(0, items)])
    share_out(library(dtype).gather_panels, calls, dtype, None if shared else 1)
    return list(found)


def gathers(
    views: Sequence[tuple[Tensor, Tensor | None]], panels: Sequence[Tensor], parts: Sequence[tuple[int, int]]
) -> list[_Gather]:
    """The calls that read the tables' rows into panels, for each part of the items."""
    return [
        _Gather(
            *(pointer(each) for each in (table, rows, own)),
            *(table.stride(0), table.stride(1), table.element_size(), *table.shape[1:], own.shape[2], *part),
        )
        for part in parts
        for (table, rows), own in zip(views, panels)
    ]


def rounds(towers: int, items: int, split: bool) -> list[list[_Piece]]:
    """What may be worked on at once, the largest first; split: no item by two towers, which add to its gradient."""
    if split or not items:
        return [[_Piece(tower, *share) for share in shares(items)] for tower in range(towers)]
    order = list(range(towers - 1))
    order.insert(len(order) // 2, towers - 1)  # the last, which reads most, in the middle, where two workers meet
    found = []
    for start, length in cut(towers * items, max(1, min(cores(), MOST_WORKERS, towers * items // LEAST_ROWS))):
        begins = [(tower, start - place * items) for place, tower in enumerate(order)]
        own = [(tower, max(0, begin), min(items, begin + length)) for tower, begin in begins]
        found += [_Piece(tower, begin, end - begin) for tower, begin, end in own if begin < end]
    return [sorted(found, key=lambda piece: -piece.count)]


def _empty_gradients(kept: _Kept, gated: bool) -> dict[str, Tensor]:
    found = {name: torch.empty_like(getattr(kept, name)) for name in (*Tower._fields[2:], "projection")}
    if gated:
        found["gate"] = kept.down_weight.new_empty(len(kept.down_weight))
    return found


def _joined(tower: Tower, projection: Tensor) -> dict[str, Tensor]:
    """What the bottlenecks below add, as `encode` in C++ takes it."""
    gate, *own = tower[1:]
    weights = composites(Weights(tower.views, mixes(gate, len(tower.views), len(own[0])), *own, projection))
    layers, bottleneck, _ = tower.down_weight.shape
    joined = projection.new_zeros(layers, bottleneck, layers * bottleneck)
    for own, weight in zip(joined, weights.weights):
        own[:, : weight.shape[1]] = weight
    return {
        "joined": joined,
        "joined_bias": torch.stack(weights.biases),
        "joined_projection": weights.projection.contiguous(),
        "joined_projection_bias": weights.bias,
    }


def panels_of(columns: int) -> int:
    return -(-columns // PANEL)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * 2)(*map(pointer, tensors))
