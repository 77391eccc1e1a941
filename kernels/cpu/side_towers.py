"""The towers of a side network on a CPU by C++ (`cpp/side_network.cpp`), in pieces that stay in a core's cache.

The towers' items stand in one row, which is cut once a core: a tower that is left whole needs no adding up.
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
from .library import DTYPES, PANEL, library, run, share_out
from .step_memory import Memory
from .structs import GatherStruct, TowerStruct
from .sums import add_up

PARAMETERS = len(Tower._fields) - 1  # of a tower: all but its views
MOST_WORKERS = 16
LEAST_ROWS = 48  # of a worker: it reads all the weights of a tower, and writes as many gradients
MOST_UNTRAINED = 384  # items at a time where no backward follows, so that their states stay in the cache


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str,
    projections: Sequence[Tensor],
) -> list[Tensor]:
    """Return the reference's outputs, differentiable once, of arguments that `refusal` lets pass."""
    settings = TowerSettings(activation == "gelu", [tower.views for tower in towers], [view.rows for view in states])
    parameters = [*(parameter for tower in towers for parameter in tower[1:]), *projections]
    return list(SideTowersFunction.apply(settings, *(view.table for view in states), *parameters))


def refusal(tower: Tower, projections: Sequence[Tensor] | None, trained: bool) -> str:
    """Return why C++ does not take towers like this one, or ""; trained: a backward may follow."""
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
    """Return the same outputs if no backward follows, a part of the items at a time."""
    settings = TowerSettings(activation == "gelu", [tower.views for tower in towers], [view.rows for view in states])
    tables = [view.table for view in states]
    parameters = [*(parameter for tower in towers for parameter in tower[1:]), *projections]
    items = len(tables[0]) if settings.rows[0] is None else len(settings.rows[0])
    outputs = [projection.new_empty(items, len(projection)) for projection in projections]
    joined = list(map(composites, towers, projections))
    encode_towers = library(parameters[1].dtype).side_encode

    def work(part: slice) -> None:
        part_tables = [table[part] if rows is None else table for table, rows in zip(tables, settings.rows)]
        part_rows = [None if rows is None else rows[part] for rows in settings.rows]
        memory = Memory()  # until the calls have ended
        part_towers = _tower_memory(settings._replace(rows=part_rows), part_tables, parameters, memory, trained=False)
        for tower, weights, output in zip(part_towers, joined, outputs):
            more = {name: pointer(weight) for name, weight in weights._asdict().items()}
            piece = TowerPiece(0, 0, tower.inputs.shape[2])
            run(encode_towers, tower.call(piece, projected=pointer(output[part]), **more))

    at_once(work, equal_parts(items, MOST_UNTRAINED))
    return outputs


class TowerSettings(NamedTuple):
    """What towers depend on beside tables and parameters."""

    gelu: bool
    reads: list[tuple[int, ...]]  # the views of each tower
    rows: list[Tensor | None]  # of each view


class TowerPiece(NamedTuple):
    """A part of a tower's items: one call of the library."""

    tower: int
    start: int
    count: int


class TowerMemory(NamedTuple):
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
    arguments: TowerStruct  # of no items yet

    def call(self, piece: TowerPiece, **more: Any) -> TowerStruct:
        """Return the arguments of the C++ for a piece of the tower."""
        struct = TowerStruct.from_buffer_copy(self.arguments)
        struct.start, struct.count = piece.start, piece.count
        for name, value in more.items():
            setattr(struct, name, value)
        return struct


class SideTowersFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: TowerSettings, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(settings.rows)
        tables, parameters = tensors[:count], tensors[count:]
        memory = Memory()
        towers = _tower_memory(settings, tables, parameters, memory)
        split = any(ctx.needs_input_grad[1 : 1 + count])  # towers add to their views' gradients
        ctx.rounds = rounds(len(towers), towers[0].inputs.shape[2], split)
        dtype = parameters[1].dtype

        # Not left for the backward: a node that held its own outputs would never be freed.
        projected = [tower.inputs.new_empty(tower.inputs.shape[2], len(tower.projection)) for tower in towers]
        for pieces in ctx.rounds:
            outputs = [pointer(projected[piece.tower]) for piece in pieces]
            calls = [towers[piece.tower].call(piece, projected=output) for piece, output in zip(pieces, outputs)]
            share_out(library(dtype).side_forward, calls, dtype)
        ctx.settings, ctx.towers, ctx.memory = settings, towers, memory
        ctx.save_for_backward(*parameters)  # alone to refuse parameters that were changed in between
        return tuple(projected)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        settings, towers, parameters = ctx.settings, ctx.towers, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1 : 1 + len(settings.rows)]
        layers, _, width = towers[0].down_weight.shape
        items = towers[0].inputs.shape[2]
        of_views = [upstream[0].new_zeros(items, layers, width) if want else None for want in wanted]
        upstream = [gradient.contiguous() for gradient in upstream]
        dtype, parts = parameters[1].dtype, [[] for _ in towers]
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
    """Return the towers' tensors, with the hidden states gathered in panels.

    If they are not trained, the calling thread gathers alone, and the towers share memory for one layer's input.
    """
    views = _panels(tables, settings.rows, parameters[1].dtype, memory, trained)
    layers, bottleneck, width = parameters[1].shape
    items, dtype, result = views[0].shape[2], parameters[1].dtype, []
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
    """Return the arguments of the C++ for a tower's tensors, in the order of `TowerMemory`."""
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
    """Return rows of each view as panels [K, ceil(D / 16), N, 16], all of them in bf16 or all in `dtype`.

    shared: the cores share the work; otherwise the calling thread does it.
    """
    kind = torch.bfloat16 if all(table.dtype == torch.bfloat16 for table in tables) else dtype
    views = []
    for table, numbers in zip(tables, rows):
        if table.dtype != kind or table.stride(2) != 1:
            table = (table if numbers is None else table.index_select(0, numbers)).to(kind).contiguous()
            numbers = None
        views.append((table, None if numbers is None else numbers.contiguous()))
    items, (_, layers, width) = len(tables[0]) if rows[0] is None else len(rows[0]), tables[0].shape
    panels = memory.empty(kind, len(views), layers, panels_of(width), items, PANEL).unbind()
    calls = gathers(views, panels, shares(items) if shared else [(0, items)])
    share_out(library(dtype).gather_panels, calls, dtype, None if shared else 1)
    return list(panels)


def gathers(
    views: Sequence[tuple[Tensor, Tensor | None]], panels: Sequence[Tensor], parts: Sequence[tuple[int, int]]
) -> list[GatherStruct]:
    """Return the calls that read the tables' rows into panels, for each part of the items."""
    return [
        GatherStruct(
            *(pointer(tensor) for tensor in (table, rows, to)),
            *(table.stride(0), table.stride(1), table.element_size(), *table.shape[1:], to.shape[2], *part),
        )
        for part in parts
        for (table, rows), to in zip(views, panels)
    ]


def rounds(towers: int, items: int, split: bool) -> list[list[TowerPiece]]:
    """Return lists of pieces that may be worked on at once, the largest first.

    split: no item by two towers at once, since both add to its gradient.
    """
    if split or not items:
        return [[TowerPiece(tower, *share) for share in shares(items)] for tower in range(towers)]
    order = list(range(towers - 1))
    order.insert(len(order) // 2, towers - 1)  # the last, which reads most, in the middle, where two workers meet
    pieces = []
    for start, length in cut(towers * items, max(1, min(cores(), MOST_WORKERS, towers * items // LEAST_ROWS))):
        begins = [(tower, start - place * items) for place, tower in enumerate(order)]
        spans = [(tower, max(0, begin), min(items, begin + length)) for tower, begin in begins]
        pieces += [TowerPiece(tower, begin, end - begin) for tower, begin, end in spans if begin < end]
    return [sorted(pieces, key=lambda piece: -piece.count)]


def _empty_gradients(tower: TowerMemory, gated: bool) -> dict[str, Tensor]:
    gradients = {name: torch.empty_like(getattr(tower, name)) for name in (*Tower._fields[2:], "projection")}
    if gated:
        gradients["gate"] = tower.down_weight.new_empty(len(tower.down_weight))
    return gradients


def panels_of(columns: int) -> int:
    return -(-columns // PANEL)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * 2)(*map(pointer, tensors))
