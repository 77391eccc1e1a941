"""The towers of a side network on a CPU in C++ (`cpp/side_network.cpp`).

The items of all towers are laid out in one row, which is divided into one piece for each core. A tower that lies in one
piece needs no sum of gradients.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.side_towers import GATE_TEMPERATURE
from ..threads import at_once, cores, cut, equal_parts, shares
from ..types import States, Tower
from .composites import composites
from .library import DTYPES, PANEL, library
from .schedule import run, share_out
from .step_memory import Memory
from .structs import GatherStruct, TowerStruct
from .sums import add_up

PARAMETERS = len(Tower._fields) - 1  # parameters of a tower: all fields but views
MOST_WORKERS = 16
LEAST_ROWS = 48  # items of a worker, at least: it reads all weights of a tower and writes as many gradients
MOST_UNTRAINED = 384  # items of a part if no backward follows, so that their states stay in the cache


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str,
    projections: Sequence[Tensor],
) -> list[Tensor]:
    """Return each tower's projected output [N, d], differentiable once; `refusal` must return ""."""
    settings = TowerSettings(activation == "gelu", [tower.views for tower in towers], [view.rows for view in states])
    parameters = [*(parameter for tower in towers for parameter in tower[1:]), *projections]
    return list(SideTowersFunction.apply(settings, *(view.table for view in states), *parameters))


def refusal(tower: Tower, projections: Sequence[Tensor] | None, trained: bool) -> str:
    """Return why the C++ cannot take towers like this one, or ""; trained: a backward may follow."""
    bottleneck = tower.down_weight.shape[1]
    if projections is None:
        return "it needs projections"
    if tower.down_weight.dtype not in DTYPES:
        return "it needs weights of float32 or float64"
    if not trained and bottleneck % PANEL:
        return f"without gradients it needs a bottleneck that is a multiple of {PANEL}, found {bottleneck}"
    return ""


@torch.no_grad()
def encode(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str,
    projections: Sequence[Tensor],
) -> list[Tensor]:
    """Return each tower's projected output [N, d] without gradients.

    The cores take parts of the items. The products of `composites` replace those through the width of the states.
    """
    settings = TowerSettings(activation == "gelu", [tower.views for tower in towers], [view.rows for view in states])
    tables = [view.table for view in states]
    parameters = [*(parameter for tower in towers for parameter in tower[1:]), *projections]
    items = len(tables[0]) if settings.rows[0] is None else len(settings.rows[0])
    outputs = [projection.new_empty(items, len(projection)) for projection in projections]
    joined = list(map(composites, towers, projections))
    encode_towers = library(parameters[1].dtype).side_encode

    def work(part: slice) -> None:
        """Write the outputs of the items in `part`."""
        part_tables = [table[part] if rows is None else table for table, rows in zip(tables, settings.rows)]
        part_rows = [None if rows is None else rows[part] for rows in settings.rows]
        memory = Memory()  # holds the part's memory until the calls have ended
        part_towers = _tower_memory(settings._replace(rows=part_rows), part_tables, parameters, memory, trained=False)
        for tower, weights, output in zip(part_towers, joined, outputs):
            more = {name: pointer(weight) for name, weight in weights._asdict().items()}
            piece = TowerPiece(0, 0, tower.inputs.shape[2])
            run(encode_towers, tower.call(piece, projected=pointer(output[part]), **more))

    at_once(work, equal_parts(items, MOST_UNTRAINED))
    return outputs


class TowerSettings(NamedTuple):
    """The arguments of towers that have no gradient."""

    gelu: bool  # the activation: GELU or else ReLU
    reads: list[tuple[int, ...]]  # the views of each tower
    rows: list[Tensor | None]  # the row numbers of each view, int64 [N]; None: all rows in order


class TowerPiece(NamedTuple):
    """A range of items of one tower; one C++ call computes it."""

    tower: int
    start: int  # first item
    count: int  # number of items


class TowerMemory(NamedTuple):
    """The tensors of one tower, and the C++ call that points into them."""

    gate: Tensor | None  # [K]
    down_weight: Tensor  # [K, R, D]
    down_bias: Tensor  # [K, R]
    up_weight: Tensor  # [K, D, R]
    up_bias: Tensor  # [K, D]
    projection: Tensor  # [d, D]
    hidden: list[Tensor]  # hidden states of each view it reads, in panels [K, ceil(D / 16), N, 16]
    inputs: Tensor  # input of each layer, in panels [K, ceil(D / 16), N, 16]
    before: Tensor  # bottlenecks before the activation, in panels [K, ceil(R / 16), N, 16]
    after: Tensor  # bottlenecks after the activation; the same tensor as `before` with ReLU
    arguments: TowerStruct  # a call without items

    def call(self, piece: TowerPiece, **more: Any) -> TowerStruct:
        """Return the C++ call on a piece of the tower; more: other fields of `TowerStruct` to set."""
        struct = TowerStruct.from_buffer_copy(self.arguments)
        struct.start = piece.start
        struct.count = piece.count
        for name, value in more.items():
            setattr(struct, name, value)
        return struct


class SideTowersFunction(torch.autograd.Function):
    """The autograd function of `side_towers`."""

    @staticmethod
    def forward(ctx, settings: TowerSettings, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return each tower's projected output [N, d]; tensors: the views' tables, towers' parameters, projections."""
        count = len(settings.rows)
        tables, parameters = tensors[:count], tensors[count:]
        memory = Memory()
        towers = _tower_memory(settings, tables, parameters, memory)
        split = any(ctx.needs_input_grad[1 : 1 + count])  # towers add to the gradients of the tables
        ctx.rounds = rounds(len(towers), towers[0].inputs.shape[2], split)
        dtype = parameters[1].dtype

        # Not stored in ctx: a node that holds its own outputs is never freed.
        projected = [tower.inputs.new_empty(tower.inputs.shape[2], len(tower.projection)) for tower in towers]
        for pieces in ctx.rounds:
            outputs = [pointer(projected[piece.tower]) for piece in pieces]
            calls = [towers[piece.tower].call(piece, projected=output) for piece, output in zip(pieces, outputs)]
            share_out(library(dtype).side_forward, calls, dtype)
        ctx.settings = settings
        ctx.towers = towers
        ctx.memory = memory
        ctx.save_for_backward(*parameters)  # so that autograd refuses a backward after parameters changed in place
        return tuple(projected)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tables, parameters and projections from those of the outputs."""
        settings = ctx.settings
        towers = ctx.towers
        parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1 : 1 + len(settings.rows)]
        layers, _, width = towers[0].down_weight.shape
        items = towers[0].inputs.shape[2]
        of_views = [upstream[0].new_zeros(items, layers, width) if want else None for want in wanted]
        upstream = [gradient.contiguous() for gradient in upstream]
        dtype = parameters[1].dtype
        parts = [[] for _ in towers]
        for pieces in ctx.rounds:
            calls = []
            for piece in pieces:
                tower = towers[piece.tower]
                gradients = _empty_gradients(tower, gated=parameters[PARAMETERS * piece.tower] is not None)
                parts[piece.tower].append(gradients)
                more = {f"of_{name}": pointer(gradient) for name, gradient in gradients.items()}
                of_hidden = _pointers([of_views[view] for view in settings.reads[piece.tower]])
                more |= {"upstream": pointer(upstream[piece.tower]), "of_hidden": of_hidden}
                calls.append(tower.call(piece, **more))
            share_out(library(dtype).side_backward, calls, dtype)
        add_up([[gradients[name] for gradients in of_tower] for of_tower in parts for name in of_tower[0]])
        totals = [of_tower[0] for of_tower in parts]
        of_parameters = [total.get(name) for total in totals for name in Tower._fields[1:]]
        return None, *of_views, *of_parameters, *(total["projection"] for total in totals)


def _tower_memory(
    settings: TowerSettings,
    tables: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    memory: Memory,
    trained: bool = True,
) -> list[TowerMemory]:
    """Gather the hidden states into panels and return the tensors of each tower.

    Without `trained`, the calling thread gathers alone, and all towers share the memory of one layer's input.
    """
    views = _panels(tables, settings.rows, parameters[1].dtype, memory, trained)
    layers, bottleneck, width = parameters[1].shape
    items = views[0].shape[2]
    dtype = parameters[1].dtype
    result = []
    towers, inputs_each = (len(settings.reads), layers) if trained else (1, 1)
    inputs = memory.empty(dtype, towers, inputs_each, panels_of(width), items, PANEL)
    before = memory.empty(dtype, towers, layers, panels_of(bottleneck), items, PANEL)
    after = memory.empty(dtype, *before.shape) if settings.gelu else before
    for i, reads in enumerate(settings.reads):
        weights = *parameters[PARAMETERS * i : PARAMETERS * (i + 1)], parameters[PARAMETERS * len(settings.reads) + i]
        weights = [weight if weight is None else weight.contiguous() for weight in weights]
        places = [tensor[i % towers] for tensor in (inputs, before, after)]
        tensors = *weights, [views[view] for view in reads], *places
        result.append(TowerMemory(*tensors, tower_struct(settings.gelu, *tensors)))
    return result


def tower_struct(gelu: bool, gate: Tensor | None, *tensors: Tensor | list[Tensor]) -> TowerStruct:
    """Return a C++ call without items; tensors: the fields of `TowerMemory` from down_weight to after."""
    down_weight, down_bias, up_weight, up_bias, projection, hidden, inputs, before, after = tensors
    layers, bottleneck, width = down_weight.shape
    return TowerStruct(
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
    """Return the rows of each view in panels [K, ceil(D / 16), N, 16]; in bf16 if all tables are, else in `dtype`.

    With `shared` the cores divide the work; otherwise the calling thread does it.
    """
    kind = torch.bfloat16 if all(table.dtype == torch.bfloat16 for table in tables) else dtype
    views = []
    for table, numbers in zip(tables, rows):
        if table.dtype != kind or table.stride(2) != 1:
            table = (table if numbers is None else table.index_select(0, numbers)).to(kind).contiguous()
            numbers = None
        views.append((table, None if numbers is None else numbers.contiguous()))
    items = len(tables[0]) if rows[0] is None else len(rows[0])
    (_, layers, width) = tables[0].shape
    panels = memory.empty(kind, len(views), layers, panels_of(width), items, PANEL).unbind()
    calls = gathers(views, panels, shares(items) if shared else [(0, items)])
    share_out(library(dtype).gather_panels, calls, dtype, None if shared else 1)
    return list(panels)


def gathers(
    views: Sequence[tuple[Tensor, Tensor | None]], panels: Sequence[Tensor], parts: Sequence[tuple[int, int]]
) -> list[GatherStruct]:
    """Return the C++ calls that copy rows of tables into panels, one for each view and part of the items.

    Args: views: (table [M, K, D], row numbers int64 [N] or None); panels: the target of each view,
    [K, ceil(D / 16), N, 16]; parts: (start, length) of the items.
    """
    return [
        GatherStruct(
            *(pointer(tensor) for tensor in (table, rows, to)),
            *(table.stride(0), table.stride(1), table.element_size(), *table.shape[1:], to.shape[2], *part),
        )
        for part in parts
        for (table, rows), to in zip(views, panels)
    ]


def rounds(towers: int, items: int, split: bool) -> list[list[TowerPiece]]:
    """Divide the items of all towers into pieces; return them in rounds. The pieces of a round may run in parallel.

    Without `split` there is one round, its largest pieces first. With `split` there is one round for each tower, so
    that no two towers add to the gradient of the same item at once.
    """
    if split or not items:
        return [[TowerPiece(tower, *share) for share in shares(items)] for tower in range(towers)]
    order = list(range(towers - 1))
    order.insert(len(order) // 2, towers - 1)  # the last tower, which reads most, in the middle, where pieces meet
    pieces = []
    for start, length in cut(towers * items, max(1, min(cores(), MOST_WORKERS, towers * items // LEAST_ROWS))):
        begins = [(tower, start - place * items) for place, tower in enumerate(order)]
        spans = [(tower, max(0, begin), min(items, begin + length)) for tower, begin in begins]
        pieces += [TowerPiece(tower, begin, end - begin) for tower, begin, end in spans if begin < end]
    return [sorted(pieces, key=lambda piece: -piece.count)]


def _empty_gradients(tower: TowerMemory, gated: bool) -> dict[str, Tensor]:
    """Return uninitialised gradients of a tower's parameters and projection, by name."""
    gradients = {name: torch.empty_like(getattr(tower, name)) for name in (*Tower._fields[2:], "projection")}
    if gated:
        gradients["gate"] = tower.down_weight.new_empty(len(tower.down_weight))
    return gradients


def panels_of(columns: int) -> int:
    """Return the number of panels of 16 columns that hold `columns` columns."""
    return -(-columns // PANEL)


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first number; None for None."""
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Return the addresses of one or two tensors as a C array of two pointers."""
    return (ctypes.c_void_p * 2)(*map(pointer, tensors))
