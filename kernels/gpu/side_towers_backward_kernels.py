"""The Triton kernels of the towers' backward; side_towers.py says what they compute together, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from .side_towers_kernels import mixed_state


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
def recur_backward(
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
                    state = mixed_state(
                        state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                    )
            sums = ()
            for i in tl.static_range(GROUP):
                k = i_k + i
                state = mixed_state(
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
                state = mixed_state(
                    state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                )
        below = ()  # p_{k-1} of each layer of the group
        for i in tl.static_range(GROUP):
            below = below + (state,)
            state = mixed_state(
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
