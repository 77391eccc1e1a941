"""The side network in Triton: all towers of one shape at once, reading the tables of hidden states by row number.

Apart from its bottlenecks a tower is linear in the hidden states. With c[k, j] the product of the carries j + 1 .. k
(the carry of a layer is the weight of the previous state in its input),

    p_k = carry_k p_{k-1} + beta_k first_k + gamma_k second_k                           width D, elementwise
    z_k = W_down,k p_k + sum over j < k of c[k, j] W_down,k W_up,j a_j + bias           width R; a_k = act(z_k)
    out = p_{K-1} + sum over j of c[K-1, j] (W_up,j a_j + b_up,j)                       width D

is the reference's tower with its sums in another order. beta and gamma are the weights of the views. Only the mix p and
three matrix products have width D. No tensor [items, layers, width] is written, except the gradient of a table that
requires one. The composites c[k, j] W_down,k W_up,j are as small as weights: `tower_operands` computes them by
differentiable PyTorch operations, and the custom op takes them as an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..types import States, Tower
from . import side_towers_backward_kernels as backward
from . import side_towers_kernels as forward
from .configurations import Configuration, configuration
from .launch import block, fit_range, launch, precision
from .projected_towers import groups_of, rows_of_tiles
from .side_towers_mix_kernels import mix_gradients
from .tower_operands import tower_operands


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the output of each tower, [N, D] or with projections [N, d]; the caller has checked the arguments."""
    first_towers, second_towers = (sum(1 << i for i, tower in enumerate(towers) if v in tower.views) for v in (0, 1))
    read = states if second_towers else [states[0], States(states[0].table.detach(), states[0].rows)]
    dtype = _operand_dtype(*(view.table for view in read))
    read = [view if view.table.dtype == dtype or view.rows is None else _gathered(view) for view in read]
    tables = [view.table if view.table.stride(2) == 1 else view.table.contiguous() for view in read]
    rows = [
        torch.arange(len(view.table), device=view.table.device) if view.rows is None else view.rows.contiguous()
        for view in read
    ]
    weights = tower_operands(towers, first_towers, second_towers, dtype)
    out, _, _ = _side_towers(tables[0], rows[0], tables[1], rows[1], *weights, first_towers, second_towers, activation)
    outputs = list(out.to(towers[0].down_weight.dtype).unbind(0))
    return outputs if projections is None else list(map(F.linear, outputs, projections))


@torch.library.custom_op("iisan_fast::side_towers", mutates_args=())
def _side_towers(
    first: Tensor,
    first_rows: Tensor,
    second: Tensor,
    second_rows: Tensor,
    coefficients: Tensor,
    down: Tensor,
    bias: Tensor,
    composites: Tensor,
    up: Tensor,
    up_bias: Tensor,
    first_towers: int,
    second_towers: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out fp32 [T, N, D], and for the backward z (empty with relu) and a, [T, N, K, R] in the tables' dtype.

    Args: first, second [M, K, D] with rows int64 [N]; coefficients to up_bias: the results of `tower_operands`;
    first_towers, second_towers: bit t is set if tower t reads that view.
    """
    coefficients, down, bias, composites, up, up_bias = _contiguous(coefficients, down, bias, composites, up, up_bias)
    dtype = _operand_dtype(first, second)
    first, second = first.to(dtype), second.to(dtype)  # tiles of two dtypes would not fit in shared memory
    call = TowersCall(first, first_rows, second, second_rows, down, first_towers, second_towers)
    out = call.empty(call.width, dtype=torch.float32)
    projected = call.empty(call.layers, call.bottleneck, dtype=torch.float32)
    activated = call.empty(call.layers, call.bottleneck)
    inputs = torch.empty_like(activated) if activation == "gelu" else activated.new_empty(0)
    shape = call.shape
    # project: mixes p, writes W_down p of every layer, and p of the last layer into out
    chosen = call.configuration("side_project")
    groups = groups_of(call.layers, chosen.blocks["GROUP"])
    launch(
        forward.project,
        "side_project",
        (call.tiles(chosen) * call.count, groups * triton.cdiv(call.bottleneck, call.r_block)),
        chosen,
        *call.views,
        coefficients,
        down.to(call.dtype),
        down,  # no heads
        projected,
        out,
        *call.count_of_items,
        **call.uncounted,
        **shape,
        **call.flags,
        DOWN_PLACES=call.down_places,
        **_blocks(chosen, GROUP=triton.cdiv(call.layers, groups)),
    )
    # recur: the bottlenecks of each layer from those below it
    chosen = call.configuration("side_recur")
    launch(
        forward.recur,
        "side_recur",
        (call.tiles(chosen) * call.count,),
        chosen,
        projected,
        bias,
        composites.to(call.dtype),
        up,  # no projected up
        inputs if activation == "gelu" else activated,
        activated,
        out,
        *call.count_of_items,
        **call.uncounted,
        **shape,
        GELU=activation == "gelu",
        **_blocks(chosen),
    )
    # expand: out += a W_up
    chosen = call.configuration("side_expand")
    launch(
        forward.expand,
        "side_expand",
        (call.tiles(chosen), triton.cdiv(call.width, chosen.blocks["BD"]), call.count),
        chosen,
        activated,
        up.to(call.dtype),
        up_bias,
        out,
        call.items,
        call.width,
        call.layers * call.bottleneck,
        PRECISION=shape["PRECISION"],
        **_blocks(chosen),
    )
    return out, inputs, activated


@_side_towers.register_fake
def _(first, first_rows, second, second_rows, coefficients, down, bias, composites, up, up_bias, a, b, activation):
    """Return empty tensors with the shapes and dtypes of `_side_towers`."""
    count, layers, bottleneck, width = down.shape
    items = first_rows.shape[0]
    out = down.new_empty((count, items, width), dtype=torch.float32)
    hidden = down.new_empty((count, items, layers, bottleneck), dtype=_operand_dtype(first, second))
    return out, torch.empty_like(hidden) if activation == "gelu" else hidden.new_empty(0), hidden


@torch.library.custom_op("iisan_fast::side_towers_backward", mutates_args=())
def _side_towers_backward(
    gradient: Tensor,
    inputs: Tensor,
    activated: Tensor,
    first: Tensor,
    first_rows: Tensor,
    second: Tensor,
    second_rows: Tensor,
    coefficients: Tensor,
    down: Tensor,
    composites: Tensor,
    up: Tensor,
    first_towers: int,
    second_towers: int,
    activation: str,
    wants: list[bool],
) -> list[Tensor]:
    """Return fp32 gradients of first, second, coefficients, down, bias, composites, up and up_bias.

    wants: for each of them, whether it is needed; others are empty tensors. Those of first and second are [N, K, D].
    """
    coefficients, down, composites, up = _contiguous(coefficients, down, composites, up)
    dtype = _operand_dtype(first, second)
    first, second = first.to(dtype), second.to(dtype)  # tiles of two dtypes would not fit in shared memory
    call = TowersCall(first, first_rows, second, second_rows, down, first_towers, second_towers)
    gradient, scale = fit_range(gradient, call.dtype)
    shape = call.shape
    gradients = [gradient.new_empty(0, dtype=torch.float32) for _ in range(8)]
    of_first, of_second, of_coefficients, of_down, of_bias, of_composites, of_up, of_up_bias = range(8)
    if wants[of_up_bias]:
        gradients[of_up_bias] = gradient.sum(1, dtype=torch.float32)
    # collect: the part of every bottleneck output's gradient that comes directly from out
    collected = call.empty(call.layers, call.bottleneck, dtype=torch.float32)
    chosen = call.configuration("side_collect")
    launch(
        backward.collect,
        "side_collect",
        (call.tiles(chosen), triton.cdiv(call.layers * call.bottleneck, chosen.blocks["BQ"]), call.count),
        chosen,
        gradient,
        *gradient.stride(),
        up.to(call.dtype),
        collected,
        call.items,
        call.width,
        call.layers * call.bottleneck,
        PRECISION=shape["PRECISION"],
        **_blocks(chosen),
    )
    # recur backward: the gradient of every bottleneck input, from the last layer down
    bottlenecks = call.empty(call.layers, call.bottleneck)
    chosen = call.configuration("side_recur_backward")
    launch(
        backward.recur_backward,
        "side_recur_backward",
        (call.tiles(chosen) * call.count,),
        chosen,
        collected,
        collected,  # no operands
        up,  # no projected up
        composites.to(call.dtype),
        inputs if activation == "gelu" else activated,
        bottlenecks,
        *call.count_of_items,
        **call.uncounted,
        **shape,
        GELU=activation == "gelu",
        **_blocks(chosen),
    )
    if wants[of_bias]:
        gradients[of_bias] = bottlenecks.sum(1, dtype=torch.float32)
    if wants[of_composites]:
        flat = (call.count, call.items, call.layers * call.bottleneck)
        # a sum over the items may exceed 65,504, the largest fp16 number
        dtype = torch.float32 if call.dtype == torch.float16 else call.dtype
        products = torch.matmul(bottlenecks.to(dtype).view(flat).mT, activated.to(dtype).view(flat))
        gradients[of_composites] = products.float().view(composites.shape)
    chained = (coefficients, gradient, *gradient.stride(), bottlenecks)
    for of_weight in (of_down, of_up):
        if wants[of_weight]:
            gradients[of_weight] = _weight_gradients(call, chained, activated, of_weight == of_down)
    if wants[of_first] or wants[of_second] or wants[of_coefficients]:
        of_mix = _mix_gradients(
            call, chained, down.to(call.dtype), wants[of_first], wants[of_second], wants[of_coefficients]
        )
        gradients[of_coefficients], gradients[of_first], gradients[of_second] = of_mix
    return gradients if scale is None else [value / scale for value in gradients]


def _weight_gradients(call: TowersCall, chained: tuple, activated: Tensor, of_down: bool) -> Tensor:
    """Return the gradient [T, K, R, D] of down if of_down, else of up; splits of the items are added in order."""
    chosen = call.configuration("side_weight_gradients")
    groups = groups_of(call.layers, chosen.blocks["GROUP"])
    columns = triton.cdiv(call.width, chosen.blocks["BD"]) * call.count
    others = groups * triton.cdiv(call.bottleneck, call.r_block)
    splits = max(1, min(call.tiles(chosen), chosen.blocks["PROGRAMS"] // (columns * others)))
    parts = call.fp32(splits, call.count, call.layers, call.bottleneck, call.width)
    launch(
        backward.weight_gradients,
        "side_weight_gradients",
        (columns, others, splits),
        chosen,
        *call.views,
        *chained,
        activated,
        parts,
        parts,
        parts[0].numel(),
        *call.count_of_items,
        **call.uncounted,
        **call.shape,
        **call.flags,
        DOWN=of_down,
        UP=not of_down,
        **_blocks(chosen, without=("PROGRAMS",), GROUP=triton.cdiv(call.layers, groups)),
    )
    return parts.sum(0)


def _mix_gradients(
    call: TowersCall, chained: tuple, down: Tensor, first: bool, second: bool, gates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the coefficients [T, K, 3] and of both views [N, K, D].

    Each is empty unless gates, first or second asks for it. chained: coefficients, gradient with its strides, dz.
    """
    chosen = call.configuration("side_mix_gradients")
    groups = groups_of(call.layers, chosen.blocks["GROUP"])
    columns = triton.cdiv(triton.cdiv(call.width, chosen.blocks["BD"]), chosen.blocks["CHUNKS"])
    parts = call.fp32(call.tiles(chosen), columns, call.count, call.layers, 3)
    shape = (call.count, call.items, call.layers, call.width)
    first_parts, second_parts = (call.fp32(*(shape if wanted else (1, 0))) for wanted in (first, second))
    launch(
        mix_gradients,
        "side_mix_gradients",
        (call.tiles(chosen) * call.count, columns),
        chosen,
        *call.views,
        *chained[:-1],
        down,  # no heads
        chained[-1],
        down,
        parts,
        first_parts,
        second_parts,
        *call.count_of_items,
        **call.uncounted,
        **call.shape,
        **call.flags,
        DOWN_PLACES=call.down_places,
        GATED=gates,
        OF_FIRST=first,
        OF_SECOND=second,
        **_blocks(chosen, GROUP=triton.cdiv(call.layers, groups)),
    )
    return parts.sum((0, 1)) if gates else call.fp32(0), first_parts.sum(0), second_parts.sum(0)


@_side_towers_backward.register_fake
def _(
    gradient,
    inputs,
    activated,
    first,
    first_rows,
    second,
    second_rows,
    coefficients,
    down,
    composites,
    up,
    a,
    b,
    activation,
    wants,
):
    """Return empty tensors with the shapes and dtypes of `_side_towers_backward`."""
    count, layers, bottleneck, width = down.shape
    dense = (first_rows.shape[0], layers, width)
    shapes = [dense, dense, coefficients.shape, down.shape, down.shape[:3], composites.shape, up.shape, (count, width)]
    wanted = list(wants)
    return [gradient.new_empty(shape if want else 0, dtype=torch.float32) for shape, want in zip(shapes, wanted)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save the tensors and settings that `_backward` needs."""
    first, first_rows, second, second_rows, coefficients, down, _, composites, up, _, *ctx.settings = inputs
    _, z, activated = output
    ctx.mark_non_differentiable(z, activated)
    ctx.save_for_backward(z, activated, first, first_rows, second, second_rows, coefficients, down, composites, up)


def _backward(ctx: Any, gradient: Tensor, _z: None, _activated: None) -> tuple:
    """Return the gradients of tables and operands from that of out; None for other arguments."""
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 4, 5, 6, 7, 8, 9)]
    gradients = _side_towers_backward(gradient, *ctx.saved_tensors, *ctx.settings, needs)
    first, second, *others = [value if need else None for value, need in zip(gradients, needs)]
    return first, None, second, None, *others, None, None, None


_side_towers.register_autograd(_backward, setup_context=_setup_context)


class TowersCall:
    """The shapes of one call of the op, and the arguments that several kernels share."""

    def __init__(
        self,
        first: Tensor,
        first_rows: Tensor,
        second: Tensor,
        second_rows: Tensor,
        down: Tensor,
        first_towers: int,
        second_towers: int,
    ) -> None:
        """Take the arguments of `_side_towers`; down [T, K, R, D]."""
        self.dtype = _operand_dtype(first, second)
        self.device = first.device
        self.count, self.layers, self.bottleneck, self.width = down.shape
        self.items = len(first_rows)
        self.r_block = block(self.bottleneck)
        self.views = (first, first_rows, *first.stride()[:2], second, second_rows, *second.stride()[:2])
        self.shape = {
            "TOWERS": self.count,
            "K": self.layers,
            "R": self.bottleneck,
            "BR": self.r_block,
            "PRECISION": precision(self.dtype),
        }
        self.flags = {
            "D": self.width,
            "PACKED": {first.stride(1), second.stride(1)} == {self.width},
            "FIRST_TOWERS": first_towers,
            "SECOND_TOWERS": second_towers,
        }
        self.uncounted = {"COUNTED": False, "HEADS": 0}
        self.count_of_items = (first_rows, self.items)  # all items count, so no kernel reads the first element
        self.down_places = tuple(range(0, down.numel(), down[0].numel()))

    def configuration(self, kernel: str) -> Configuration:
        """Return the configuration of a kernel, a key of `CONFIGURATIONS`, for this call."""
        return configuration(kernel, rows_of_tiles(self.items, self.layers, self.bottleneck), self.dtype, self.device)

    def tiles(self, chosen: Configuration) -> int:
        """Return the number of tiles of BM items."""
        return triton.cdiv(self.items, chosen.blocks["BM"])

    def fp32(self, *shape: int) -> Tensor:
        """Return an uninitialised fp32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor [towers, items, *shape]; dtype: the products' where None."""
        return torch.empty((self.count, self.items, *shape), dtype=dtype or self.dtype, device=self.device)


def _operand_dtype(*tables: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: bf16 if a table is bf16, else fp16 if one is fp16, else fp32."""
    dtypes = {table.dtype for table in tables}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)


def _gathered(view: States) -> States:
    """Return a view of only the rows that are read, since the op converts its tables to one dtype."""
    return States(view.table[view.rows])


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """Return contiguous tensors, copied where needed."""
    return [tensor.contiguous() for tensor in tensors]


def _blocks(chosen: Configuration, without: tuple[str, ...] = (), **replaced: int) -> dict[str, int]:
    """Return the tile sizes of a configuration, without some names and with others replaced."""
    return {name: size for name, size in chosen.blocks.items() if name not in without} | replaced
