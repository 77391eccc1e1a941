"""The Triton kernels of the towers' forward; side_towers.py says what they compute together, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed_state(
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
def project(
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
                state = mixed_state(
                    state, k, c_ptr, f_ptr, first_stride_k, m_f, s_ptr, second_stride_k, m_s, SECOND_TOWERS != 0
                )
        sums = ()
        for i in tl.static_range(GROUP):
            state = mixed_state(
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
def recur(
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
def expand(
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
