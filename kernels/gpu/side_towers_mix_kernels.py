"""The Triton kernel for the gradients of the mix p: of the gates, and of the hidden states.

side_towers.py has the equations and launches it for outputs [T, N, D], with HEADS = 0; projected_towers.py launches it
for item vectors [N, d], with HEADS = d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .side_towers_kernels import coefficient, coefficients_of, load_tile, state_below, tower_place, true_count


@triton.jit
def sums_in_threads(products):
    """Sum [BM, BD] to [BM, 4]; in the layout of a matrix product each thread adds its own numbers, without shuffles."""
    BM: tl.constexpr = products.shape[0]
    BD: tl.constexpr = products.shape[1]
    return tl.sum(tl.sum(tl.reshape(products, (BM, BD // 8, 4, 2)), 3), 1)


@triton.jit
def gate_slopes(
    state, x_ptr, x_stride, y_ptr, y_stride, x_weights, m_d, LOW: tl.constexpr, TOP: tl.constexpr,
    BOTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the derivatives of p_k in the gate, of layers LOW .. TOP - 1: x - p_{k-1}, or with BOTH views x - y.

    state: p_{LOW-1} [BM, BD].
    """
    slopes = ()
    for k in tl.static_range(LOW, TOP):
        x = load_tile(x_ptr + tl.cast(k, tl.int64) * x_stride, m_d[None, :], MASKED).to(tl.float32)
        if BOTH:
            y = load_tile(y_ptr + tl.cast(k, tl.int64) * y_stride, m_d[None, :], MASKED).to(tl.float32)
            slope = x - y
            state = state + y + x_weights[k] * slope
        else:
            slope = x - state
            state += x_weights[k] * slope
        slopes = slopes + (slope,)
    return slopes


@triton.jit
def mix_gradients_of_layers(
    dp, sums, carries, x_weights, x_ptr, x_stride, x_which, y_ptr, y_stride, c_ptr, bottlenecks_ptr, down_ptr,
    first_parts_ptr, second_parts_ptr, o_n, m_n, o_d, m_d, LOW: tl.constexpr, TOP: tl.constexpr,
    BOTH: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    GATED: tl.constexpr, OF_FIRST: tl.constexpr, OF_SECOND: tl.constexpr, MASKED: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Take dp back through layers TOP - 1 .. LOW; return it, and the gates' sums [BM, 4] of these layers.

    With OF_FIRST, OF_SECOND write the gradients of the views' hidden states.
    """
    if GATED:
        state = tl.zeros((BM, BD), tl.float32)
        if LOW > 0:
            state = state_below(LOW, c_ptr, x_which, x_ptr, x_stride, y_ptr, y_stride, m_d, BOTH, MASKED, BM, BD)
        slopes = gate_slopes(state, x_ptr, x_stride, y_ptr, y_stride, x_weights, m_d, LOW, TOP, BOTH, MASKED)
    new_sums = ()
    for k in tl.static_range(TOP - 1, LOW - 1, -1):
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            p_dz = bottlenecks_ptr + o_n.to(tl.int64)[:, None] * (K * R) + k * R + o_r[None, :]
            b_dz = tl.load(p_dz, mask=m_n[:, None] & m_r[None, :], other=0.0)
            p_down = down_ptr + (k * R + o_r).to(tl.int64)[:, None] * D + o_d[None, :]
            b_down = load_tile(p_down, m_r[:, None] & m_d[None, :], MASKED or R % BR != 0)
            dp = tl.dot(b_dz, b_down, dp, input_precision=PRECISION)
        if GATED:
            new_sums = (sums[k] + sums_in_threads(dp * slopes[k - LOW]),) + new_sums
        o_dense = o_n.to(tl.int64)[:, None] * (K * D) + k * D + o_d[None, :]
        m_dense = m_n[:, None] & m_d[None, :]
        if OF_FIRST:
            tl.store(first_parts_ptr + o_dense, coefficient(c_ptr, k, 1) * dp, mask=m_dense)
        if OF_SECOND:
            tl.store(second_parts_ptr + o_dense, coefficient(c_ptr, k, 2) * dp, mask=m_dense)
        if not BOTH:
            dp *= carries[k]
    return dp, new_sums


@triton.jit
def mix_gradients_of_tower(
    x_ptr, x_stride, x_which, y_ptr, y_stride, c_ptr, gradient_ptr, gradient_stride_n, gradient_stride_d, heads_ptr,
    bottlenecks_ptr, down_ptr, parts_ptr, first_parts_ptr, second_parts_ptr, o_n, m_n, first_chunk, last_chunk,
    BOTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, GATED: tl.constexpr, OF_FIRST: tl.constexpr, OF_SECOND: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write one tower's mix gradients of a tile, over chunks first_chunk .. last_chunk - 1 of the width."""
    MASKED: tl.constexpr = D % BD != 0
    carries, x_weights = coefficients_of(c_ptr, 0, 0, K), coefficients_of(c_ptr, 0, x_which, K)
    if HEADS > 0:
        o_e = tl.arange(0, HEADS)
        b_dy = tl.load(gradient_ptr + o_n.to(tl.int64)[:, None] * HEADS + o_e[None, :], mask=m_n[:, None], other=0.0)
    sums = (tl.zeros((BM, 4), tl.float32),) * K
    for i_chunk in range(first_chunk, last_chunk):
        o_d = i_chunk * BD + tl.arange(0, BD)
        m_d = o_d < D
        p_x, p_y = x_ptr[:, None] + o_d[None, :], y_ptr[:, None] + o_d[None, :]
        if HEADS > 0:
            b_heads = load_tile(heads_ptr + o_e[:, None] * D + o_d[None, :], m_d[None, :], MASKED)
            dp = tl.dot(b_dy, b_heads, input_precision=PRECISION)
        else:
            p_gradient = gradient_ptr + o_n.to(tl.int64)[:, None] * gradient_stride_n
            p_gradient += o_d.to(tl.int64)[None, :] * gradient_stride_d
            dp = tl.load(p_gradient, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        new_sums = ()
        for step in tl.static_range((K + GROUP - 1) // GROUP):
            dp, group_sums = mix_gradients_of_layers(
                dp, sums, carries, x_weights, p_x, x_stride, x_which, p_y, y_stride, c_ptr, bottlenecks_ptr, down_ptr,
                first_parts_ptr, second_parts_ptr, o_n, m_n, o_d, m_d,
                K - GROUP * step - GROUP if GROUP * step + GROUP < K else 0, K - GROUP * step,
                BOTH, D, K, R, BR, PRECISION, GATED, OF_FIRST, OF_SECOND, MASKED, BM, BD,
            )  # fmt: skip
            new_sums = group_sums + new_sums
        if GATED:
            sums = new_sums
    if GATED:
        for k in tl.static_range(K):
            tl.store(parts_ptr + 3 * k, 0.0)
            tl.store(parts_ptr + 3 * k + x_which, tl.sum(sums[k]))
            tl.store(parts_ptr + 3 * k + 3 - x_which, 0.0)


@triton.jit(do_not_specialize=["N"])
def mix_gradients(
    first_ptr,  # [M, K, D]
    first_rows_ptr,  # [N]
    first_stride_n,
    first_stride_k,
    second_ptr,
    second_rows_ptr,
    second_stride_n,
    second_stride_k,
    coefficients_ptr,  # [T, K, 3]
    gradient_ptr,  # [T, N, D], any strides, or of the vectors [N, HEADS]
    gradient_stride_t,
    gradient_stride_n,
    gradient_stride_d,
    heads_ptr,  # [T, HEADS, D]
    bottlenecks_ptr,  # [T, N, K, R]: dz
    down_ptr,  # [K, R, D] of each tower, from the first tower's on
    parts_ptr,  # [tiles, programs of the width, T, K, 3]
    first_parts_ptr,  # [T, N, K, D]
    second_parts_ptr,  # [T, N, K, D]
    count_ptr,
    N,
    COUNTED: tl.constexpr,
    HEADS: tl.constexpr,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    DOWN_PLACES: tl.constexpr,  # offset of each tower's down-projections from those of the first tower
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    GATED: tl.constexpr,
    OF_FIRST: tl.constexpr,
    OF_SECOND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute dp_k from the last layer down; write parts of the gates' gradients, and gradients of the hidden states.

    The gradient of a gate is written in place of that of one coefficient, the weight that grows with the gate: of the
    tower's view, or of the first of two. The other two coefficients get 0. Back through the coefficients, which are
    linear in the gate, this gives the gates' gradients. Without GATED no parts are written. A program takes CHUNKS
    chunks of the width. Programs beyond the true count write nothing.
    """
    i_tower = tl.program_id(0) % TOWERS
    o_tower = i_tower.to(tl.int64)
    i_tile = tl.program_id(0) // TOWERS
    count = true_count(count_ptr, N, COUNTED)
    if i_tile * BM >= count:
        return
    o_n = i_tile * BM + tl.arange(0, BM)
    m_n = o_n < count
    o_row = tl.minimum(o_n, count - 1)
    p_first = first_ptr + tl.load(first_rows_ptr + o_row).to(tl.int64) * first_stride_n
    p_second = second_ptr + tl.load(second_rows_ptr + o_row).to(tl.int64) * second_stride_n
    first_stride = first_stride_k
    second_stride = second_stride_k
    if PACKED:
        first_stride = D
        second_stride = D
    first_chunk = tl.program_id(1) * CHUNKS
    last_chunk = tl.minimum(first_chunk + CHUNKS, tl.cdiv(D, BD))
    c_ptr = coefficients_ptr + i_tower * K * 3
    p_gradient = gradient_ptr + o_tower * gradient_stride_t
    p_heads = heads_ptr + o_tower * HEADS * D
    p_dz = bottlenecks_ptr + o_tower * N * K * R
    p_down = down_ptr + tower_place(i_tower, DOWN_PLACES, TOWERS)
    p_parts = parts_ptr + ((i_tile * tl.num_programs(1) + tl.program_id(1)) * TOWERS + i_tower).to(tl.int64) * K * 3
    o_dense = o_tower * N * K * D
    reads_first, reads_second = (FIRST_TOWERS >> i_tower) & 1, (SECOND_TOWERS >> i_tower) & 1
    if reads_first & reads_second:
        mix_gradients_of_tower(
            p_first, first_stride, 1, p_second, second_stride,
            c_ptr, p_gradient, gradient_stride_n, gradient_stride_d, p_heads, p_dz, p_down,
            p_parts, first_parts_ptr + o_dense, second_parts_ptr + o_dense, o_n, m_n, first_chunk, last_chunk,
            True, HEADS, D, K, R, BR, PRECISION, GATED, OF_FIRST, OF_SECOND, GROUP, BM, BD,
        )  # fmt: skip
    else:
        p_x = tl.where(reads_first == 1, p_first, p_second)
        x_stride = first_stride
        if not PACKED:
            x_stride = tl.where(reads_first == 1, first_stride, second_stride)
        mix_gradients_of_tower(
            p_x, x_stride, 2 - reads_first, p_x, x_stride,
            c_ptr, p_gradient, gradient_stride_n, gradient_stride_d, p_heads, p_dz, p_down,
            p_parts, first_parts_ptr + o_dense, second_parts_ptr + o_dense, o_n, m_n, first_chunk, last_chunk,
            False, HEADS, D, K, R, BR, PRECISION, GATED, OF_FIRST, OF_SECOND, GROUP, BM, BD,
        )  # fmt: skip
