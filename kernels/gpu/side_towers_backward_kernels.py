"""The Triton kernels of the towers' backward. side_towers.py has the equations; dx is the gradient of x.

side_towers.py launches them for outputs [T, N, D], with HEADS = 0; projected_towers.py for item vectors [N, d], with
HEADS = d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .side_towers_kernels import coefficients_of, load_tile, mixed_state, state_below, true_count


@triton.jit(do_not_specialize=["N"])
def collect(
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
    """Write a tile [BM, BQ] of collected = gradient W_up^T."""
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
def recur_backward(
    start_ptr,  # collected [T, N, K, R], or the gradient of the vectors [N, HEADS]
    operands_ptr,  # [N, HEADS]: the gradient of the vectors in the products' dtype; not written if that is fp32
    projected_up_ptr,  # [T, K, R, HEADS]
    composites_ptr,  # [T, K, R, K, R]
    inputs_ptr,  # [T, N, K, R]: z with GELU; else a, which is positive exactly where z is
    bottlenecks_ptr,  # [T, N, K, R]
    count_ptr,
    N,
    COUNTED: tl.constexpr,
    HEADS: tl.constexpr,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
):
    """Write dz of a tile for one tower, from the last layer down.

    dz_k = act'(z_k) (da_k + sum over j > k of composites[j, k]^T dz_j), where da_k is collected_k, or with HEADS the
    gradient of the vectors times projected_up_k^T.
    """
    i_tower = tl.program_id(0) % TOWERS
    count = true_count(count_ptr, N, COUNTED)
    start = (tl.program_id(0) // TOWERS) * BM
    if start >= count:
        return
    o_n = start + tl.arange(0, BM)
    m_n = o_n < count
    o_item = (i_tower.to(tl.int64) * N + o_n) * K * R
    if HEADS > 0:
        o_e = tl.arange(0, HEADS)
        o_dy = o_n.to(tl.int64)[:, None] * HEADS + o_e[None, :]
        b_dy = tl.load(start_ptr + o_dy, mask=m_n[:, None], other=0.0).to(composites_ptr.dtype.element_ty)
        if operands_ptr.dtype.element_ty != tl.float32:
            tl.store(operands_ptr + o_dy, b_dy, mask=(o_n < tl.where(i_tower == 0, count, 0))[:, None])
    for step in range(K):
        k = K - 1 - step
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            m_z = m_n[:, None] & m_r[None, :]
            o_z = o_item[:, None] + k * R + o_r[None, :]
            if HEADS > 0:
                p_up = projected_up_ptr + ((i_tower * K + k) * R + o_r).to(tl.int64)[:, None] * HEADS + o_e[None, :]
                b_up = tl.load(p_up, mask=m_r[:, None], other=0.0)
                da = tl.dot(b_dy, b_up.T, input_precision=PRECISION)
            else:
                da = tl.load(start_ptr + o_z, mask=m_z, other=0.0)
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
        tl.debug_barrier()  # the next layer reads what all threads of this program wrote


@triton.jit
def weight_gradients_of_tower(
    x_ptr, x_rows_ptr, x_stride_n, x_stride_k, x_which, y_ptr, y_rows_ptr, y_stride_n, y_stride_k,
    c_ptr, gradient_ptr, gradient_stride_n, gradient_stride_d, bottlenecks_ptr, activated_ptr,
    down_parts_ptr, last_parts_ptr, i_k, own_k, o_r, o_d, first_tile, last_tile, count, is_first_block,
    BOTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write one tower's weight gradients, summed over tiles first_tile .. last_tile - 1.

    The pointers are those of the tower. Layers below own_k belong to another program and are not written.
    """
    MASKED: tl.constexpr = D % BD != 0
    m_d, m_r = o_d < D, o_r < R
    carries = coefficients_of(c_ptr, i_k, 0, GROUP)
    x_weights, y_weights = coefficients_of(c_ptr, i_k, x_which, GROUP), coefficients_of(c_ptr, i_k, 2, GROUP)
    downs = (tl.zeros((BR, BD), tl.float32),) * GROUP
    ups = (tl.zeros((BR, BD), tl.float32),) * GROUP
    if HEADS > 0:
        o_e = tl.arange(0, HEADS)
        heads = tl.zeros((HEADS, BD), tl.float32)
    for i_tile in range(first_tile, last_tile):
        o_n = i_tile * BM + tl.arange(0, BM)
        m_n = o_n < count
        o_hidden = o_n.to(tl.int64)[:, None] * (K * R) + i_k * R + o_r[None, :]
        m_hidden = m_n[:, None] & m_r[None, :]
        if DOWN:
            o_row = tl.minimum(o_n, count - 1)
            p_x = x_ptr + tl.load(x_rows_ptr + o_row).to(tl.int64)[:, None] * x_stride_n + o_d[None, :]
            p_y = p_x
            if BOTH:
                p_y = y_ptr + tl.load(y_rows_ptr + o_row).to(tl.int64)[:, None] * y_stride_n + o_d[None, :]
            state = tl.zeros((BM, BD), tl.float32)
            if GROUP < K:
                state = state_below(i_k, c_ptr, x_which, p_x, x_stride_k, p_y, y_stride_k, m_d, BOTH, MASKED, BM, BD)
            sums = ()
            for i in tl.static_range(GROUP):
                o_k = tl.cast(i_k + i, tl.int64)
                x = load_tile(p_x + o_k * x_stride_k, m_d[None, :], MASKED)
                y = x
                if BOTH:
                    y = load_tile(p_y + o_k * y_stride_k, m_d[None, :], MASKED)
                state = mixed_state(state, carries[i], x_weights[i], x, y_weights[i], y, BOTH)
                b_dz = tl.load(bottlenecks_ptr + o_hidden + i * R, mask=m_hidden, other=0.0)
                sums = sums + (tl.dot(b_dz.T, state.to(b_dz.dtype), downs[i], input_precision=PRECISION),)
            downs = sums
            if HEADS > 0:
                p_dy = gradient_ptr + o_n.to(tl.int64)[:, None] * HEADS + o_e[None, :]
                b_dy = tl.load(p_dy, mask=m_n[:, None], other=0.0)
                heads = tl.dot(b_dy.T, state.to(b_dy.dtype), heads, input_precision=PRECISION)
        if UP:
            p_gradient = gradient_ptr + o_n.to(tl.int64)[:, None] * gradient_stride_n
            p_gradient += o_d.to(tl.int64)[None, :] * gradient_stride_d
            b_gradient = tl.load(p_gradient, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_gradient = b_gradient.to(activated_ptr.dtype.element_ty)
            sums = ()
            for i in tl.static_range(GROUP):
                b_a = tl.load(activated_ptr + o_hidden + i * R, mask=m_hidden, other=0.0)
                sums = sums + (tl.dot(b_a.T, b_gradient, ups[i], input_precision=PRECISION),)
            ups = sums
    for i in tl.static_range(GROUP):
        k = i_k + i
        o_part = (k * R + o_r).to(tl.int64)[:, None] * D + o_d[None, :]
        m_part = (o_r < tl.where(k >= own_k, R, 0))[:, None] & m_d[None, :]
        if DOWN:
            tl.store(down_parts_ptr + o_part, downs[i], mask=m_part)
        if UP:
            tl.store(last_parts_ptr + o_part, ups[i], mask=m_part)
    if HEADS > 0:
        is_last = (i_k + GROUP == K) & is_first_block
        m_heads = (o_e < tl.where(is_last, HEADS, 0))[:, None] & m_d[None, :]
        tl.store(last_parts_ptr + o_e[:, None] * D + o_d[None, :], heads, mask=m_heads)


@triton.jit(do_not_specialize=["N"])
def weight_gradients(
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
    bottlenecks_ptr,  # [T, N, K, R]: dz
    activated_ptr,  # [T, N, K, R]: a
    down_parts_ptr,  # [S, T, K, R, D]
    last_parts_ptr,  # [S, T, HEADS, D]: of P; or [S, T, K, R, D]: of up
    part_stride,  # from split to split
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
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write a split's part of the weight gradients, for a group of layers and BD columns of the width.

    With DOWN: dz_k^T p_k, and with HEADS dy^T p_{K-1}. With UP: a_k^T gradient. The programs of the third axis divide
    the items into splits. FIRST_TOWERS, SECOND_TOWERS, PACKED: as in `project`.
    """
    i_tower = tl.program_id(0) % TOWERS
    o_tower = i_tower.to(tl.int64)
    o_d = (tl.program_id(0) // TOWERS) * BD + tl.arange(0, BD)
    i_block = tl.program_id(1) % tl.cdiv(R, BR)
    o_r = i_block * BR + tl.arange(0, BR)
    own_k = (tl.program_id(1) // tl.cdiv(R, BR)) * GROUP
    i_k = tl.minimum(own_k, K - GROUP)  # the last group may start with layers of the group before; it skips their store
    count = true_count(count_ptr, N, COUNTED)
    tiles = tl.cdiv(count, BM)
    of_split = tl.cdiv(tiles, tl.num_programs(2))
    first_tile = tl.program_id(2) * of_split
    last_tile = tl.minimum(first_tile + of_split, tiles)
    first_stride = first_stride_k
    second_stride = second_stride_k
    if PACKED:
        first_stride = D
        second_stride = D
    c_ptr = coefficients_ptr + i_tower * K * 3
    p_gradient = gradient_ptr + o_tower * gradient_stride_t
    p_dz = bottlenecks_ptr + o_tower * N * K * R
    p_a = activated_ptr + o_tower * N * K * R
    o_split = tl.program_id(2).to(tl.int64) * part_stride
    p_down = down_parts_ptr + o_split + o_tower * K * R * D
    p_last = last_parts_ptr + o_split + o_tower * (HEADS if HEADS > 0 else K * R) * D
    reads_first, reads_second = (FIRST_TOWERS >> i_tower) & 1, (SECOND_TOWERS >> i_tower) & 1
    if reads_first & reads_second:
        weight_gradients_of_tower(
            first_ptr, first_rows_ptr, first_stride_n, first_stride, 1,
            second_ptr, second_rows_ptr, second_stride_n, second_stride,
            c_ptr, p_gradient, gradient_stride_n, gradient_stride_d, p_dz, p_a,
            p_down, p_last, i_k, own_k, o_r, o_d, first_tile, last_tile, count, i_block == 0,
            True, HEADS, D, K, R, BR, PRECISION, DOWN, UP, GROUP, BM, BD,
        )  # fmt: skip
    else:
        x_ptr = tl.where(reads_first == 1, first_ptr, second_ptr)
        x_rows_ptr = tl.where(reads_first == 1, first_rows_ptr, second_rows_ptr)
        x_stride_n = tl.where(reads_first == 1, first_stride_n, second_stride_n)
        x_stride = first_stride
        if not PACKED:
            x_stride = tl.where(reads_first == 1, first_stride, second_stride)
        weight_gradients_of_tower(
            x_ptr, x_rows_ptr, x_stride_n, x_stride, 2 - reads_first, x_ptr, x_rows_ptr, x_stride_n, x_stride,
            c_ptr, p_gradient, gradient_stride_n, gradient_stride_d, p_dz, p_a,
            p_down, p_last, i_k, own_k, o_r, o_d, first_tile, last_tile, count, i_block == 0,
            False, HEADS, D, K, R, BR, PRECISION, DOWN, UP, GROUP, BM, BD,
        )  # fmt: skip
