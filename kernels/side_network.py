"""The side network in Triton: all equal-shaped towers at once, straight from the resident tables by row number.

A tower is linear in the frozen states but for its bottlenecks. With c[k, j] the product of the carries j + 1 .. k,

    p_k = carry_k p_{k-1} + beta_k first_k + gamma_k second_k                           width D, elementwise
    z_k = W_down,k p_k + sum over j < k of c[k, j] W_down,k W_up,j a_j + bias           width R; a_k = act(z_k)
    out = p_{K-1} + sum over j of c[K-1, j] (W_up,j a_j + b_up,j)                       width D

is `reference.side_tower` with its sums in another order. All that happens at width D is the mix and three matrix
products: the states are read where they lie, nothing of size [items, layers, width] is written, forward or backward,
and no gradient passes through a chain of D-wide layers. The composites W_down,k W_up,j are as small as weights;
`_prepare` makes them with plain differentiable operations, and the op takes them as an input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Configuration, block, configuration, fit_range, launch, precision
from .reference import GATE_TEMPERATURE, States, Tower


def side_towers(states: Sequence[States], towers: Sequence[Tower], activation: str = "relu") -> list[Tensor]:
    """`reference.side_towers` by Triton kernels; the caller has checked the arguments."""
    first_towers, second_towers = (sum(1 << i for i, tower in enumerate(towers) if v in tower.views) for v in (0, 1))
    read = states if second_towers else [states[0], States(states[0].table.detach(), states[0].rows)]
    dtype = _operand_dtype(*(view.table for view in read))
    read = [view if view.table.dtype == dtype or view.rows is None else _gathered(view) for view in read]
    tables = [view.table if view.table.stride(2) == 1 else view.table.contiguous() for view in read]
    rows = [
        torch.arange(len(view.table), device=view.table.device) if view.rows is None else view.rows.contiguous()
        for view in read
    ]
    weights = _prepare(towers, first_towers, second_towers, dtype)
    out, _, _ = _side_towers(tables[0], rows[0], tables[1], rows[1], *weights, first_towers, second_towers, activation)
    return list(out.to(towers[0].down_weight.dtype).unbind(0))


def _prepare(towers: Sequence[Tower], first_towers: int, second_towers: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the kernels read, from the towers' parameters, differentiably.

    Returns in fp32: coefficients [T, K, 3] (carry, first's and second's weight), down [T, K, R, D], bias [T, K, R],
    composites [T, K, R, K, R] (zero unless the second layer lies below the first), up [T, K, R, D], up_bias [T, D].
    """
    down = torch.stack([tower.down_weight for tower in towers]).float()
    up = torch.stack([tower.up_weight.mT for tower in towers]).float().contiguous()
    down_bias = torch.stack([tower.down_bias for tower in towers]).float()
    up_bias = torch.stack([tower.up_bias for tower in towers]).float()
    count, layers, bottleneck, width = down.shape
    constant = _constants(count, first_towers, second_towers, layers, down.device)
    if towers[0].gate is None:
        coefficients, carry = constant.plain, constant.at_or_below.expand(count, -1, -1)
    else:
        logits = torch.stack([tower.gate for tower in towers]).float() / GATE_TEMPERATURE
        coefficients = constant.base + constant.slope * torch.sigmoid(logits)[..., None]
        log_carry = constant.is_intra * F.logsigmoid(-logits)
        carry = (constant.between * log_carry[:, None, None, :]).sum(3).exp() * constant.at_or_below
    below = carry * constant.below
    flat = (count, layers * bottleneck, width)
    product_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # fp16 gradients would underflow here
    composites = torch.matmul(down.to(product_dtype).view(flat), up.to(product_dtype).view(flat).mT)
    composites = composites.view(count, layers, bottleneck, layers, bottleneck) * below[:, :, None, :, None]
    through_bias = torch.matmul(down.view(flat), up_bias.mT).view(count, layers, bottleneck, layers)
    final = carry[:, -1, :, None]
    return (
        coefficients,
        down,
        down_bias + (through_bias * below[:, :, None, :]).sum(3),
        composites,
        up * final[..., None],
        (up_bias * final).sum(1),
    )


class _Constants:
    """What depends on the towers' kinds and depth alone, made on the device (nothing is copied from the host)."""

    def __init__(self, towers: int, first_towers: int, second_towers: int, layers: int, device: torch.device) -> None:
        tower, k = torch.arange(towers, device=device), torch.arange(layers, device=device)
        first, second = (((readers >> tower) & 1).float()[:, None] for readers in (first_towers, second_towers))
        both, one = first * second, torch.ones_like(first)
        self.is_intra = one - both
        # alone: carry 1 - g, weight g; both: carry 1, first g, second 1 - g
        self.base = torch.stack([one, 0 * one, both], dim=2)
        self.slope = torch.stack([-self.is_intra, first, self.is_intra * second - both], dim=2)
        self.plain = torch.stack([one, first, second], dim=2).expand(-1, layers, -1)
        self.below = (k[:, None] > k).float()  # [k, j]: layer j lies below layer k
        self.at_or_below = (k[:, None] >= k).float()
        i = k[None, None, :]
        self.between = ((i > k[None, :, None]) & (i <= k[:, None, None])).float()  # [k, j, i]: j < i <= k


@functools.lru_cache(maxsize=32)
def _constants(towers: int, first_towers: int, second_towers: int, layers: int, device: torch.device) -> _Constants:
    with torch.inference_mode(False):  # a first call in inference must not keep later ones from being trained
        return _Constants(towers, first_towers, second_towers, layers, device)


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
    """(out fp32 [T, N, D], bottleneck inputs z and outputs a [T, N, K, R] in the operands' dtype).

    first, second [M, K, D] with rows int64 [N]; first_towers, second_towers: bit t set where tower t reads that view.
    """
    coefficients, down, bias, composites, up, up_bias = _contiguous(coefficients, down, bias, composites, up, up_bias)
    dtype = _operand_dtype(first, second)
    first, second = first.to(dtype), second.to(dtype)  # tiles of two dtypes would not fit in shared memory
    call = _Call(first, first_rows, second, second_rows, down, first_towers, second_towers)
    out = call.empty(call.width, dtype=torch.float32)
    projected = call.empty(call.layers, call.bottleneck, dtype=torch.float32)
    inputs, activated = (call.empty(call.layers, call.bottleneck) for _ in range(2))
    shape = call.shape
    # project: p mixed on the fly, W_down p for every layer, and p of the last layer into out
    chosen = call.configuration("side_project")
    groups = _groups(call.layers, chosen.blocks["GROUP"])
    launch(
        _project,
        "side_project",
        (call.tiles(chosen) * call.count, groups * triton.cdiv(call.bottleneck, call.r_block)),
        chosen,
        *call.views,
        coefficients,
        down.to(call.dtype),
        projected,
        out,
        call.items,
        call.width,
        **shape,
        **call.flags,
        **_blocks(chosen, GROUP=triton.cdiv(call.layers, groups)),
    )
    # recur: the bottlenecks of each layer from those below it
    chosen = call.configuration("side_recur")
    launch(
        _recur,
        "side_recur",
        (call.tiles(chosen) * call.count,),
        chosen,
        projected,
        bias,
        composites.to(call.dtype),
        inputs,
        activated,
        call.items,
        **shape,
        GELU=activation == "gelu",
        **_blocks(chosen),
    )
    # expand: out += a W_up
    chosen = call.configuration("side_expand")
    launch(
        _expand,
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
    count, layers, bottleneck, width = down.shape
    items = first_rows.shape[0]
    out = down.new_empty((count, items, width), dtype=torch.float32)
    hidden = down.new_empty((count, items, layers, bottleneck), dtype=_operand_dtype(first, second))
    return out, hidden, torch.empty_like(hidden)


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
    """Gradients of first, second, coefficients, down, bias, composites, up, up_bias; wants says which are needed.

    One that is not wanted is an empty tensor. Those of first and second are [N, K, D] in fp32.
    """
    coefficients, down, composites, up = _contiguous(coefficients, down, composites, up)
    dtype = _operand_dtype(first, second)
    first, second = first.to(dtype), second.to(dtype)  # tiles of two dtypes would not fit in shared memory
    call = _Call(first, first_rows, second, second_rows, down, first_towers, second_towers)
    gradient, scale = fit_range(gradient, call.dtype)
    shape = call.shape
    strides = gradient.stride()
    gradients = [gradient.new_empty(0, dtype=torch.float32) for _ in range(8)]
    of_first, of_second, of_coefficients, of_down, of_bias, of_composites, of_up, of_up_bias = range(8)
    if wants[of_up_bias]:
        gradients[of_up_bias] = gradient.sum(1, dtype=torch.float32)
    down_operand = down.to(call.dtype)
    # collect: the gradient of every bottleneck output, as far as it comes from out
    collected = call.empty(call.layers, call.bottleneck, dtype=torch.float32)
    chosen = call.configuration("side_collect")
    launch(
        _collect,
        "side_collect",
        (call.tiles(chosen), triton.cdiv(call.layers * call.bottleneck, chosen.blocks["BQ"]), call.count),
        chosen,
        gradient,
        *strides,
        up.to(call.dtype),
        collected,
        call.items,
        call.width,
        call.layers * call.bottleneck,
        PRECISION=shape["PRECISION"],
        **_blocks(chosen),
    )
    # recur backward: the gradient of every bottleneck input, from the layers above it
    bottlenecks = call.empty(call.layers, call.bottleneck)
    chosen = call.configuration("side_recur_backward")
    launch(
        _recur_backward,
        "side_recur_backward",
        (call.tiles(chosen) * call.count,),
        chosen,
        collected,
        composites.to(call.dtype),
        inputs,
        bottlenecks,
        call.items,
        **shape,
        GELU=activation == "gelu",
        **_blocks(chosen),
    )
    if wants[of_bias]:
        gradients[of_bias] = bottlenecks.sum(1, dtype=torch.float32)
    if wants[of_composites]:
        flat = (call.count, call.items, call.layers * call.bottleneck)
        # fp16's range ends at 65,504, which a sum over the items may pass
        dtype = torch.float32 if call.dtype == torch.float16 else call.dtype
        products = torch.matmul(bottlenecks.to(dtype).view(flat).mT, activated.to(dtype).view(flat))
        gradients[of_composites] = products.float().view(composites.shape)
    if wants[of_down] or wants[of_up]:
        chosen = call.configuration("side_weight_gradients")
        groups = _groups(call.layers, chosen.blocks["GROUP"])
        columns = triton.cdiv(call.width, chosen.blocks["BD"]) * call.count
        others = groups * triton.cdiv(call.bottleneck, call.r_block)
        splits = max(1, min(call.tiles(chosen), chosen.blocks["PROGRAMS"] // (columns * others)))
        partial = (splits, call.count, call.layers, call.bottleneck, call.width)
        down_parts = down.new_empty(partial if wants[of_down] else 0, dtype=torch.float32)
        up_parts = down.new_empty(partial if wants[of_up] else 0, dtype=torch.float32)
        launch(
            _weight_gradients,
            "side_weight_gradients",
            (columns, others, splits),
            chosen,
            *call.views,
            coefficients,
            gradient,
            *strides,
            bottlenecks,
            activated,
            down_parts,
            up_parts,
            call.items,
            call.width,
            triton.cdiv(call.tiles(chosen), splits),
            **shape,
            **call.flags,
            DOWN=wants[of_down],
            UP=wants[of_up],
            **_blocks(chosen, without=("PROGRAMS",), GROUP=triton.cdiv(call.layers, groups)),
        )
        if wants[of_down]:
            gradients[of_down] = down_parts.sum(0)
        if wants[of_up]:
            gradients[of_up] = up_parts.sum(0)
    if wants[of_first] or wants[of_second] or wants[of_coefficients]:
        chosen = call.configuration("side_mix_gradients")
        groups = _groups(call.layers, chosen.blocks["GROUP"])
        columns = triton.cdiv(call.width, chosen.blocks["BD"])
        parts = coefficients.new_empty((call.tiles(chosen), columns, *coefficients.shape))
        dense = (call.count, call.items, call.layers, call.width)
        first_parts = coefficients.new_empty(dense if wants[of_first] else 0)
        second_parts = coefficients.new_empty(dense if wants[of_second] else 0)
        launch(
            _mix_gradients,
            "side_mix_gradients",
            (call.tiles(chosen) * call.count, columns),
            chosen,
            *call.views,
            coefficients,
            gradient,
            *strides,
            bottlenecks,
            down_operand,
            parts,
            first_parts,
            second_parts,
            call.items,
            call.width,
            **shape,
            **call.flags,
            OF_FIRST=wants[of_first],
            OF_SECOND=wants[of_second],
            GROUPS=groups,
            **_blocks(chosen, GROUP=triton.cdiv(call.layers, groups)),
        )
        gradients[of_coefficients] = parts.sum((0, 1))
        if wants[of_first]:
            gradients[of_first] = first_parts.sum(0)
        if wants[of_second]:
            gradients[of_second] = second_parts.sum(0)
    return gradients if scale is None else [value / scale for value in gradients]


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
    count, layers, bottleneck, width = down.shape
    dense = (first_rows.shape[0], layers, width)
    shapes = [dense, dense, coefficients.shape, down.shape, down.shape[:3], composites.shape, up.shape, (count, width)]
    mixes = wants[0] or wants[1] or wants[2]
    wanted = [*wants[:2], mixes, *wants[3:]]
    return [gradient.new_empty(shape if want else 0, dtype=torch.float32) for shape, want in zip(shapes, wanted)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    first, first_rows, second, second_rows, coefficients, down, _, composites, up, _, *ctx.settings = inputs
    _, z, activated = output
    ctx.mark_non_differentiable(z, activated)
    ctx.save_for_backward(z, activated, first, first_rows, second, second_rows, coefficients, down, composites, up)


def _backward(ctx: Any, gradient: Tensor, _z: None, _activated: None) -> tuple:
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 4, 5, 6, 7, 8, 9)]
    gradients = _side_towers_backward(gradient, *ctx.saved_tensors, *ctx.settings, needs)
    first, second, *others = [value if need else None for value, need in zip(gradients, needs)]
    return first, None, second, None, *others, None, None, None


_side_towers.register_autograd(_backward, setup_context=_setup_context)


class _Call:
    """The shapes of one call, and the arguments that several kernels share."""

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
        self.dtype, self.device = _operand_dtype(first, second), first.device
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
        self.flags = {"FIRST_TOWERS": first_towers, "SECOND_TOWERS": second_towers}

    def configuration(self, kernel: str) -> Configuration:
        return configuration(kernel, self.items, self.dtype, self.device)

    def tiles(self, chosen: Configuration) -> int:
        return triton.cdiv(self.items, chosen.blocks["BM"])

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised [towers, items, *shape]."""
        return torch.empty((self.count, self.items, *shape), dtype=dtype or self.dtype, device=self.device)


def _operand_dtype(*tables: Tensor) -> torch.dtype:
    """What the products take: bf16 or fp16 where a table is kept so, else fp32."""
    dtypes = {table.dtype for table in tables}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)


def _gathered(view: States) -> States:
    """Its rows, to be read in order: the op brings its views to one dtype, which a whole table is too large for."""
    return States(view.table[view.rows])


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """What the kernels take to be packed, packed."""
    return [tensor.contiguous() for tensor in tensors]


def _groups(layers: int, most: int) -> int:
    """Into how many groups of at most `most` layers a kernel that holds a group at once divides them."""
    return -(-layers // most)


def _blocks(chosen: Configuration, without: tuple[str, ...] = (), **replaced: int) -> dict[str, int]:
    return {name: size for name, size in chosen.blocks.items() if name not in without} | replaced


@triton.jit
def _mix(
    state, k, c_ptr, first_ptr, first_stride_k, m_first, second_ptr, second_stride_k, m_second, SECOND: tl.constexpr
):
    """p_k from p_{k-1}."""
    o_k = tl.cast(k, tl.int64)  # a layer may lie further than 2^31 elements away
    first = tl.load(first_ptr + o_k * first_stride_k, mask=m_first, other=0.0).to(tl.float32)
    state = tl.load(c_ptr + 3 * k) * state + tl.load(c_ptr + 3 * k + 1) * first
    if SECOND:
        second = tl.load(second_ptr + o_k * second_stride_k, mask=m_second, other=0.0).to(tl.float32)
        state += tl.load(c_ptr + 3 * k + 2) * second
    return state


@triton.jit(do_not_specialize=["N"])
def _project(
    first_ptr,  # [M, K, D]
    first_rows_ptr,  # [N]
    first_stride_n,
    first_stride_k,
    second_ptr,
    second_rows_ptr,
    second_stride_n,
    second_stride_k,
    coefficients_ptr,  # [T, K, 3]
    down_ptr,  # [T, K, R, D]
    projected_ptr,  # [T, N, K, R]
    out_ptr,  # [T, N, D]
    N,
    D,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """W_down,k p_k for a group of layers, and p_{K-1}. Towers of one tile run side by side and share what they read."""
    i_tower = tl.program_id(0) % TOWERS
    o_n = (tl.program_id(0) // TOWERS) * BM + tl.arange(0, BM)
    o_r = (tl.program_id(1) % tl.cdiv(R, BR)) * BR + tl.arange(0, BR)
    own_k = (tl.program_id(1) // tl.cdiv(R, BR)) * GROUP
    i_k = tl.minimum(own_k, K - GROUP)  # the last group may begin with layers of the one before, and leaves them to it
    m_n, m_r = o_n < N, o_r < R
    p_first = first_ptr + tl.load(first_rows_ptr + o_n, mask=m_n, other=0) * first_stride_n
    p_second = second_ptr + tl.load(second_rows_ptr + o_n, mask=m_n, other=0) * second_stride_n
    m_first = o_n < tl.where(((FIRST_TOWERS >> i_tower) & 1) == 1, N, 0)
    m_second = o_n < tl.where(((SECOND_TOWERS >> i_tower) & 1) == 1, N, 0)
    c_ptr = coefficients_ptr + i_tower * K * 3
    p_down = down_ptr + (i_tower * K + i_k).to(tl.int64) * R * D + o_r[:, None] * D
    o_out = i_tower.to(tl.int64) * N + o_n
    n_out = tl.where((i_k + GROUP == K) & (tl.program_id(1) % tl.cdiv(R, BR) == 0), N, 0)
    totals = (tl.zeros((BM, BR), tl.float32),) * GROUP
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        state = tl.zeros((BM, BD), tl.float32)
        f_ptr, s_ptr = p_first[:, None] + o_d[None, :], p_second[:, None] + o_d[None, :]
        m_f, m_s = m_first[:, None] & m_d[None, :], m_second[:, None] & m_d[None, :]
        if GROUP < K:
            for k in range(0, i_k):
                state = _mix(
                    state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                )
        sums = ()
        for i in tl.static_range(GROUP):
            state = _mix(
                state, i_k + i, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
            )
            b_down = tl.load(p_down + i * R * D + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
            sums = sums + (tl.dot(state.to(b_down.dtype), b_down.T, totals[i], input_precision=PRECISION),)
        totals = sums
        tl.store(out_ptr + o_out[:, None] * D + o_d[None, :], state, mask=(o_n < n_out)[:, None] & m_d[None, :])
    for i in tl.static_range(GROUP):
        p_projected = projected_ptr + (o_out[:, None] * K + i_k + i) * R + o_r[None, :]
        m_own = o_r < tl.where(i_k + i >= own_k, R, 0)
        tl.store(p_projected, totals[i], mask=m_n[:, None] & m_own[None, :])


@triton.jit(do_not_specialize=["N"])
def _recur(
    projected_ptr,  # [T, N, K, R]
    bias_ptr,  # [T, K, R]
    composites_ptr,  # [T, K, R, K, R]
    inputs_ptr,  # [T, N, K, R]
    activated_ptr,  # [T, N, K, R]
    N,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
):
    """z_k = projected_k + sum over j < k of composites_kj a_j + bias_k, and a_k = act(z_k), layer after layer."""
    i_tower = tl.program_id(0) % TOWERS
    o_n = (tl.program_id(0) // TOWERS) * BM + tl.arange(0, BM)
    m_n = o_n < N
    o_item = (i_tower.to(tl.int64) * N + o_n) * K * R
    for k in range(K):
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            m_z = m_n[:, None] & m_r[None, :]
            o_z = o_item[:, None] + k * R + o_r[None, :]
            z = tl.load(projected_ptr + o_z, mask=m_z, other=0.0)
            z += tl.load(bias_ptr + (i_tower * K + k) * R + o_r, mask=m_r, other=0.0)[None, :]
            p_row = composites_ptr + ((i_tower * K + k) * R + o_r[:, None]).to(tl.int64) * K * R
            for j in range(k):
                for j_r in range(0, R, BR):
                    o_j = j_r + tl.arange(0, BR)
                    m_j = o_j < R
                    b_a = tl.load(
                        activated_ptr + o_item[:, None] + j * R + o_j[None, :],
                        mask=m_n[:, None] & m_j[None, :],
                        other=0.0,
                    )
                    b_c = tl.load(p_row + j * R + o_j[None, :], mask=m_r[:, None] & m_j[None, :], other=0.0)
                    z = tl.dot(b_a, b_c.T, z, input_precision=PRECISION)
            a = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476)) if GELU else tl.maximum(z, 0.0)
            tl.store(inputs_ptr + o_z, z, mask=m_z)
            tl.store(activated_ptr + o_z, a, mask=m_z)
        tl.debug_barrier()  # the next layer reads what all threads of this program stored


@triton.jit(do_not_specialize=["N"])
def _expand(
    activated_ptr,  # [T, N, Q], Q = K * R
    up_ptr,  # [T, Q, D]
    up_bias_ptr,  # [T, D]
    out_ptr,  # [T, N, D]: holds p_{K-1}
    N,
    D,
    Q,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
):
    """out += a W_up + b_up."""
    i_tower = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    p_out = out_ptr + (i_tower * N + o_n)[:, None] * D + o_d[None, :]
    total = tl.zeros((BM, BD), tl.float32)
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        m_q = o_q < Q
        p_a = activated_ptr + (i_tower * N + o_n)[:, None] * Q + o_q[None, :]
        b_a = tl.load(p_a, mask=m_n[:, None] & m_q[None, :], other=0.0)
        p_up = up_ptr + (i_tower * Q + o_q)[:, None] * D + o_d[None, :]
        b_up = tl.load(p_up, mask=m_q[:, None] & m_d[None, :], other=0.0)
        total = tl.dot(b_a, b_up, total, input_precision=PRECISION)
    m_out = m_n[:, None] & m_d[None, :]
    total += tl.load(p_out, mask=m_out, other=0.0)
    total += tl.load(up_bias_ptr + i_tower * D + o_d, mask=m_d, other=0.0)[None, :]
    tl.store(p_out, total, mask=m_out)


@triton.jit(do_not_specialize=["N"])
def _collect(
    gradient_ptr,  # [T, N, D], any strides
    gradient_stride_t,
    gradient_stride_n,
    gradient_stride_d,
    up_ptr,  # [T, Q, D], Q = K * R
    collected_ptr,  # [T, N, Q]
    N,
    D,
    Q,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
):
    """collected = gradient W_up^T."""
    i_tower = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    m_n, m_q = o_n < N, o_q < Q
    p_gradient = gradient_ptr + i_tower * gradient_stride_t + o_n.to(tl.int64)[:, None] * gradient_stride_n
    total = tl.zeros((BM, BQ), tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        p_up = up_ptr + (i_tower * Q + o_q)[:, None] * D + o_d[None, :]
        b_up = tl.load(p_up, mask=m_q[:, None] & m_d[None, :], other=0.0)
        m_gradient = m_n[:, None] & m_d[None, :]
        b_gradient = tl.load(p_gradient + o_d.to(tl.int64)[None, :] * gradient_stride_d, mask=m_gradient, other=0.0)
        total = tl.dot(b_gradient.to(b_up.dtype), b_up.T, total, input_precision=PRECISION)
    p_collected = collected_ptr + (i_tower * N + o_n)[:, None] * Q + o_q[None, :]
    tl.store(p_collected, total, mask=m_n[:, None] & m_q[None, :])


@triton.jit(do_not_specialize=["N"])
def _recur_backward(
    collected_ptr,  # [T, N, K, R]
    composites_ptr,  # [T, K, R, K, R]
    inputs_ptr,  # [T, N, K, R]
    bottlenecks_ptr,  # [T, N, K, R]
    N,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
):
    """dz_k = act'(z_k) (collected_k + sum over j > k of composites_jk^T dz_j), layer before layer."""
    i_tower = tl.program_id(0) % TOWERS
    o_n = (tl.program_id(0) // TOWERS) * BM + tl.arange(0, BM)
    m_n = o_n < N
    o_item = (i_tower.to(tl.int64) * N + o_n) * K * R
    for step in range(K):
        k = K - 1 - step
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            m_z = m_n[:, None] & m_r[None, :]
            o_z = o_item[:, None] + k * R + o_r[None, :]
            da = tl.load(collected_ptr + o_z, mask=m_z, other=0.0)
            for j in range(k + 1, K):
                for j_r in range(0, R, BR):
                    o_j = j_r + tl.arange(0, BR)
                    m_j = o_j < R
                    b_dz = tl.load(
                        bottlenecks_ptr + o_item[:, None] + j * R + o_j[None, :],
                        mask=m_n[:, None] & m_j[None, :],
                        other=0.0,
                    )
                    p_c = composites_ptr + ((i_tower * K + j) * R + o_j[:, None]).to(tl.int64) * K * R + k * R
                    b_c = tl.load(p_c + o_r[None, :], mask=m_j[:, None] & m_r[None, :], other=0.0)
                    da = tl.dot(b_dz, b_c, da, input_precision=PRECISION)
            z = tl.load(inputs_ptr + o_z, mask=m_z, other=0.0).to(tl.float32)
            if GELU:
                cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
                dz = da * (cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
            else:
                dz = tl.where(z > 0, da, 0.0)
            tl.store(bottlenecks_ptr + o_z, dz, mask=m_z)
        tl.debug_barrier()  # the next layer reads what all threads of this program stored


@triton.jit(do_not_specialize=["N", "tiles"])
def _weight_gradients(
    first_ptr,  # [M, K, D]
    first_rows_ptr,  # [N]
    first_stride_n,
    first_stride_k,
    second_ptr,
    second_rows_ptr,
    second_stride_n,
    second_stride_k,
    coefficients_ptr,  # [T, K, 3]
    gradient_ptr,  # [T, N, D], any strides
    gradient_stride_t,
    gradient_stride_n,
    gradient_stride_d,
    bottlenecks_ptr,  # [T, N, K, R]: dz
    activated_ptr,  # [T, N, K, R]: a
    down_parts_ptr,  # [S, T, K, R, D]
    up_parts_ptr,  # [S, T, K, R, D]
    N,
    D,
    tiles,  # of each split
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """dz_k^T p_k and a_k^T gradient over one split of the items, for a group of layers and a chunk of the width."""
    i_tower = tl.program_id(0) % TOWERS
    o_d = (tl.program_id(0) // TOWERS) * BD + tl.arange(0, BD)
    o_r = (tl.program_id(1) % tl.cdiv(R, BR)) * BR + tl.arange(0, BR)
    own_k = (tl.program_id(1) // tl.cdiv(R, BR)) * GROUP
    i_k = tl.minimum(own_k, K - GROUP)  # the last group may begin with layers of the one before, and leaves them to it
    i_split = tl.program_id(2)
    m_d, m_r = o_d < D, o_r < R
    n_first = tl.where(((FIRST_TOWERS >> i_tower) & 1) == 1, N, 0)
    n_second = tl.where(((SECOND_TOWERS >> i_tower) & 1) == 1, N, 0)
    c_ptr = coefficients_ptr + i_tower * K * 3
    downs = (tl.zeros((BR, BD), tl.float32),) * GROUP
    ups = (tl.zeros((BR, BD), tl.float32),) * GROUP
    for i_tile in range(i_split * tiles, (i_split + 1) * tiles):
        o_n = i_tile * BM + tl.arange(0, BM)
        m_n = o_n < N
        o_hidden = (i_tower.to(tl.int64) * N + o_n) * K * R
        m_hidden = m_n[:, None] & m_r[None, :]
        if DOWN:
            p_first = first_ptr + tl.load(first_rows_ptr + o_n, mask=m_n, other=0) * first_stride_n
            p_second = second_ptr + tl.load(second_rows_ptr + o_n, mask=m_n, other=0) * second_stride_n
            f_ptr, s_ptr = p_first[:, None] + o_d[None, :], p_second[:, None] + o_d[None, :]
            m_f = (o_n < n_first)[:, None] & m_d[None, :]
            m_s = (o_n < n_second)[:, None] & m_d[None, :]
            state = tl.zeros((BM, BD), tl.float32)
            if GROUP < K:
                for k in range(0, i_k):
                    state = _mix(
                        state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                    )
            sums = ()
            for i in tl.static_range(GROUP):
                k = i_k + i
                state = _mix(
                    state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                )
                p_dz = bottlenecks_ptr + o_hidden[:, None] + k * R + o_r[None, :]
                b_dz = tl.load(p_dz, mask=m_hidden, other=0.0)
                sums = sums + (tl.dot(b_dz.T, state.to(b_dz.dtype), downs[i], input_precision=PRECISION),)
            downs = sums
        if UP:
            p_gradient = gradient_ptr + i_tower.to(tl.int64) * gradient_stride_t
            p_gradient += o_n.to(tl.int64)[:, None] * gradient_stride_n + o_d.to(tl.int64)[None, :] * gradient_stride_d
            b_gradient = tl.load(p_gradient, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_gradient = b_gradient.to(activated_ptr.dtype.element_ty)
            sums = ()
            for i in tl.static_range(GROUP):
                k = i_k + i
                p_a = activated_ptr + o_hidden[:, None] + k * R + o_r[None, :]
                b_a = tl.load(p_a, mask=m_hidden, other=0.0)
                sums = sums + (tl.dot(b_a.T, b_gradient, ups[i], input_precision=PRECISION),)
            ups = sums
    for i in tl.static_range(GROUP):
        k = i_k + i
        o_part = (((i_split * TOWERS + i_tower) * K + k) * R + o_r).to(tl.int64)[:, None] * D + o_d[None, :]
        m_part = (o_r < tl.where(k >= own_k, R, 0))[:, None] & m_d[None, :]
        if DOWN:
            tl.store(down_parts_ptr + o_part, downs[i], mask=m_part)
        if UP:
            tl.store(up_parts_ptr + o_part, ups[i], mask=m_part)


@triton.jit(do_not_specialize=["N"])
def _mix_gradients(
    first_ptr,  # [M, K, D]
    first_rows_ptr,  # [N]
    first_stride_n,
    first_stride_k,
    second_ptr,
    second_rows_ptr,
    second_stride_n,
    second_stride_k,
    coefficients_ptr,  # [T, K, 3]
    gradient_ptr,  # [T, N, D], any strides
    gradient_stride_t,
    gradient_stride_n,
    gradient_stride_d,
    bottlenecks_ptr,  # [T, N, K, R]: dz
    down_ptr,  # [T, K, R, D]
    parts_ptr,  # [tiles, chunks, T, K, 3]
    first_parts_ptr,  # [T, N, K, D]
    second_parts_ptr,  # [T, N, K, D]
    N,
    D,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    OF_FIRST: tl.constexpr,
    OF_SECOND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """dp_k from the last layer down, and with it the gradients of the coefficients and of the states themselves."""
    i_tower = tl.program_id(0) % TOWERS
    i_tile = tl.program_id(0) // TOWERS
    o_n = i_tile * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    p_first = first_ptr + tl.load(first_rows_ptr + o_n, mask=m_n, other=0) * first_stride_n
    p_second = second_ptr + tl.load(second_rows_ptr + o_n, mask=m_n, other=0) * second_stride_n
    f_ptr, s_ptr = p_first[:, None] + o_d[None, :], p_second[:, None] + o_d[None, :]
    m_f = (o_n < tl.where(((FIRST_TOWERS >> i_tower) & 1) == 1, N, 0))[:, None] & m_d[None, :]
    m_s = (o_n < tl.where(((SECOND_TOWERS >> i_tower) & 1) == 1, N, 0))[:, None] & m_d[None, :]
    c_ptr = coefficients_ptr + i_tower * K * 3
    o_item = i_tower.to(tl.int64) * N + o_n
    p_part = parts_ptr + ((i_tile * tl.num_programs(1) + tl.program_id(1)) * TOWERS + i_tower).to(tl.int64) * K * 3
    p_gradient = gradient_ptr + i_tower.to(tl.int64) * gradient_stride_t
    p_gradient += o_n.to(tl.int64)[:, None] * gradient_stride_n + o_d.to(tl.int64)[None, :] * gradient_stride_d
    dp = tl.load(p_gradient, mask=m_nd, other=0.0).to(tl.float32)
    for step in range(GROUPS):
        i_k = tl.maximum(K - GROUP * (step + 1), 0)  # the lowest group may overlap the one above it
        done = K - GROUP * step
        state = tl.zeros((BM, BD), tl.float32)
        if GROUP < K:
            for k in range(0, i_k):
                state = _mix(
                    state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                )
        below = ()  # p_{k-1} of each layer of the group
        for i in tl.static_range(GROUP):
            below = below + (state,)
            state = _mix(
                state, i_k + i, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
            )
        for i in tl.static_range(GROUP - 1, -1, -1):
            k = i_k + i
            is_new = k < done
            n_r = tl.where(is_new, R, 0)
            for i_r in range(0, R, BR):
                o_r = i_r + tl.arange(0, BR)
                m_r = o_r < n_r
                p_dz = bottlenecks_ptr + (o_item[:, None] * K + k) * R + o_r[None, :]
                b_dz = tl.load(p_dz, mask=m_n[:, None] & m_r[None, :], other=0.0)
                p_down = down_ptr + ((i_tower * K + k) * R + o_r).to(tl.int64)[:, None] * D + o_d[None, :]
                b_down = tl.load(p_down, mask=m_r[:, None] & m_d[None, :], other=0.0)
                dp = tl.dot(b_dz, b_down, dp, input_precision=PRECISION)
            o_k = k.to(tl.int64)
            first = tl.load(f_ptr + o_k * first_stride_k, mask=m_f, other=0.0).to(tl.float32)
            tl.store(p_part + 3 * k, tl.sum(dp * below[i]), mask=is_new)
            tl.store(p_part + 3 * k + 1, tl.sum(dp * first), mask=is_new)
            m_nd_new = m_n[:, None] & (o_d < tl.where(is_new, D, 0))[None, :]
            o_dense = (o_item[:, None] * K + k) * D + o_d[None, :]
            if OF_FIRST:
                weight = tl.load(c_ptr + 3 * k + 1)
                tl.store(first_parts_ptr + o_dense, weight * dp, mask=m_nd_new)
            if SECOND_TOWERS != 0:
                second = tl.load(s_ptr + o_k * second_stride_k, mask=m_s, other=0.0).to(tl.float32)
                tl.store(p_part + 3 * k + 2, tl.sum(dp * second), mask=is_new)
                if OF_SECOND:
                    weight = tl.load(c_ptr + 3 * k + 2)
                    tl.store(second_parts_ptr + o_dense, weight * dp, mask=m_nd_new)
            else:
                tl.store(p_part + 3 * k + 2, 0.0, mask=is_new)
            dp *= tl.load(c_ptr + 3 * k, mask=is_new, other=1.0)
