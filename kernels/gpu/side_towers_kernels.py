"""The Triton kernels of the towers' forward. side_towers.py has the equations.

side_towers.py launches them for outputs [T, N, D], with HEADS = 0; projected_towers.py for item vectors [N, d], with
HEADS = d, where heads_ptr is the folded projection P of each tower. A program takes BM items.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def true_count(count_ptr, N, COUNTED: tl.constexpr):
    """Return the number of items to compute: the number at count_ptr if COUNTED, at most N, else N."""
    count = N
    if COUNTED:
        count = tl.minimum(tl.load(count_ptr), N)
    return count


@triton.jit
def tower_place(i_tower, PLACES: tl.constexpr, TOWERS: tl.constexpr):
    """Return entry i_tower of PLACES, the offset of a tower's weights from those of the first tower."""
    place = tl.zeros((), tl.int64)
    for i in tl.static_range(1, TOWERS):
        place = tl.where(i_tower == i, PLACES[i], place)
    return place


@triton.jit
def load_tile(pointers, mask, MASKED: tl.constexpr):
    """Load a tile, masked only if MASKED: an asynchronous copy without mask takes fewer instructions."""
    return tl.load(pointers, mask=mask, other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def coefficient(c_ptr, k, which):
    """Load a coefficient of layer k; which: 0 the carry, 1 the weight of the first view, 2 of the second view."""
    return tl.load(c_ptr + 3 * k + which)


@triton.jit
def coefficients_of(c_ptr, i_k, which, GROUP: tl.constexpr):
    """Return a tuple of GROUP scalars: a coefficient of layers i_k, i_k + 1, …; which: 0 carry, 1 first, 2 second."""
    values = ()
    for i in tl.static_range(GROUP):
        values = values + (coefficient(c_ptr, i_k + i, which),)
    return values


@triton.jit
def mixed_state(state, carry, x_weight, x, y_weight, y, BOTH: tl.constexpr):
    """Return p_k from p_{k-1} and the hidden states x of one view, or with BOTH x and y, where the carry is 1."""
    if BOTH:
        state = state + x_weight * x.to(tl.float32) + y_weight * y.to(tl.float32)
    else:
        state = carry * state + x_weight * x.to(tl.float32)
    return state


@triton.jit
def state_below(
    i_k, c_ptr, x_which, x_ptr, x_stride, y_ptr, y_stride, m_d,
    BOTH: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return p_{i_k - 1} [BM, BD]; x_ptr, y_ptr: pointers to layer 0 of the tile."""
    state = tl.zeros((BM, BD), tl.float32)
    for k in range(0, i_k):
        o_k = tl.cast(k, tl.int64)  # the offset of a layer may exceed 2^31 elements
        x = load_tile(x_ptr + o_k * x_stride, m_d[None, :], MASKED)
        y = x
        if BOTH:
            y = load_tile(y_ptr + o_k * y_stride, m_d[None, :], MASKED)
        carry, x_weight = coefficient(c_ptr, k, 0), coefficient(c_ptr, k, x_which)
        state = mixed_state(state, carry, x_weight, x, coefficient(c_ptr, k, 2), y, BOTH)
    return state


@triton.jit
def project_tower(
    x_ptr, x_stride, x_which, y_ptr, y_stride, c_ptr, down_ptr, heads_ptr, projected_ptr, out_ptr,
    i_k, own_k, o_r, o_n, count, is_first_block,
    BOTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write W_down,k p_k of a tile for GROUP layers of one tower, and p_{K-1}, or with HEADS p_{K-1} P^T.

    x_ptr, y_ptr [BM]: pointers to the items' rows of the views; the other pointers are those of the tower. Layers below
    own_k belong to another program and are not written.
    """
    MASKED: tl.constexpr = D % BD != 0
    m_r = o_r < R
    carries = coefficients_of(c_ptr, i_k, 0, GROUP)
    x_weights, y_weights = coefficients_of(c_ptr, i_k, x_which, GROUP), coefficients_of(c_ptr, i_k, 2, GROUP)
    p_down = down_ptr + (i_k * R + o_r).to(tl.int64)[:, None] * D
    totals = (tl.zeros((BR, BM), tl.float32),) * GROUP
    if HEADS > 0:
        o_e = tl.arange(0, HEADS)
        heads = tl.zeros((HEADS, BM), tl.float32)
    n_out = tl.where((i_k + GROUP == K) & is_first_block, count, 0)  # items whose last state this program handles
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        state = tl.zeros((BM, BD), tl.float32)
        p_x, p_y = x_ptr[:, None] + o_d[None, :], y_ptr[:, None] + o_d[None, :]
        if GROUP < K:
            state = state_below(i_k, c_ptr, x_which, p_x, x_stride, p_y, y_stride, m_d, BOTH, MASKED, BM, BD)
        sums = ()
        for i in tl.static_range(GROUP):
            o_k = tl.cast(i_k + i, tl.int64)
            x = load_tile(p_x + o_k * x_stride, m_d[None, :], MASKED)
            y = x
            if BOTH:
                y = load_tile(p_y + o_k * y_stride, m_d[None, :], MASKED)
            state = mixed_state(state, carries[i], x_weights[i], x, y_weights[i], y, BOTH)
            b_down = load_tile(p_down + i * R * D + o_d[None, :], m_r[:, None] & m_d[None, :], MASKED or R % BR != 0)
            sums = sums + (tl.dot(b_down, state.to(b_down.dtype).T, totals[i], input_precision=PRECISION),)
        totals = sums
        if HEADS > 0:
            b_heads = load_tile(heads_ptr + o_e[:, None] * D + o_d[None, :], m_d[None, :], MASKED)
            heads = tl.dot(b_heads, state.to(b_heads.dtype).T, heads, input_precision=PRECISION)
        else:
            m_out = (o_n < n_out)[:, None] & m_d[None, :]
            tl.store(out_ptr + o_n.to(tl.int64)[:, None] * D + o_d[None, :], state, mask=m_out)
    o_item = o_n.to(tl.int64) * K * R
    for i in tl.static_range(GROUP):
        m_own = o_r < tl.where(i_k + i >= own_k, R, 0)
        p_projected = projected_ptr + o_item[None, :] + (i_k + i) * R + o_r[:, None]
        tl.store(p_projected, totals[i], mask=m_own[:, None] & (o_n < count)[None, :])
    if HEADS > 0:
        p_out = out_ptr + o_n.to(tl.int64)[None, :] * HEADS + o_e[:, None]
        tl.store(p_out, heads, mask=(o_n < n_out)[None, :])


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
    down_ptr,  # [K, R, D] of each tower, from the first tower's on
    heads_ptr,  # [T, HEADS, D]
    projected_ptr,  # [T, N, K, R]
    out_ptr,  # [T, N, HEADS], or [T, N, D]
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
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write W_down,k p_k for a group of layers, and in the last group p_{K-1}, or with HEADS p_{K-1} P^T.

    The programs of all towers for one tile are neighbours, so that they share what they read in the cache. PACKED: the
    layers of a table lie D elements apart. FIRST_TOWERS, SECOND_TOWERS: bit t is set if tower t reads that view.
    """
    i_tower = tl.program_id(0) % TOWERS
    count = true_count(count_ptr, N, COUNTED)
    start = (tl.program_id(0) // TOWERS) * BM
    if start >= count:
        return
    i_block = tl.program_id(1) % tl.cdiv(R, BR)
    o_n = start + tl.arange(0, BM)
    o_r = i_block * BR + tl.arange(0, BR)
    own_k = (tl.program_id(1) // tl.cdiv(R, BR)) * GROUP
    i_k = tl.minimum(own_k, K - GROUP)  # the last group may start with layers of the group before; it skips their store
    o_row = tl.minimum(o_n, count - 1)  # items beyond the last read its row, so that no load of states needs a mask
    p_first = first_ptr + tl.load(first_rows_ptr + o_row).to(tl.int64) * first_stride_n
    p_second = second_ptr + tl.load(second_rows_ptr + o_row).to(tl.int64) * second_stride_n
    first_stride = first_stride_k
    second_stride = second_stride_k
    if PACKED:
        first_stride = D
        second_stride = D
    o_tower = i_tower.to(tl.int64)
    c_ptr = coefficients_ptr + i_tower * K * 3
    p_down = down_ptr + tower_place(i_tower, DOWN_PLACES, TOWERS)
    p_heads = heads_ptr + o_tower * HEADS * D
    p_projected = projected_ptr + o_tower * N * K * R
    p_out = out_ptr + o_tower * N * (HEADS if HEADS > 0 else D)
    reads_first, reads_second = (FIRST_TOWERS >> i_tower) & 1, (SECOND_TOWERS >> i_tower) & 1
    if reads_first & reads_second:
        project_tower(
            p_first, first_stride, 1, p_second, second_stride, c_ptr, p_down, p_heads, p_projected, p_out,
            i_k, own_k, o_r, o_n, count, i_block == 0,
            True, HEADS, D, K, R, BR, PRECISION, GROUP, BM, BD,
        )  # fmt: skip
    else:
        p_x = tl.where(reads_first == 1, p_first, p_second)
        x_stride = first_stride
        if not PACKED:
            x_stride = tl.where(reads_first == 1, first_stride, second_stride)
        project_tower(
            p_x, x_stride, 2 - reads_first, p_x, x_stride, c_ptr, p_down, p_heads, p_projected, p_out,
            i_k, own_k, o_r, o_n, count, i_block == 0,
            False, HEADS, D, K, R, BR, PRECISION, GROUP, BM, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def recur(
    projected_ptr,  # [T, N, K, R]
    bias_ptr,  # [T, K, R]
    composites_ptr,  # [T, K, R, K, R]
    projected_up_ptr,  # [T, K, R, HEADS]
    inputs_ptr,  # [T, N, K, R]: z, written only with GELU
    activated_ptr,  # [T, N, K, R]
    out_ptr,  # [T, N, HEADS]: holds p_{K-1} P^T
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
    """Write the bottlenecks of a tile for one tower, layer by layer.

    z_k = projected_k + bias_k + sum over j < k of composites[k, j] a_j, and a_k = act(z_k). With HEADS add the sum over
    k of a_k projected_up_k to out.
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
        p_out = out_ptr + (i_tower.to(tl.int64) * N + o_n)[:, None] * HEADS + o_e[None, :]
        out = tl.load(p_out, mask=m_n[:, None], other=0.0)
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
            if GELU:
                tl.store(inputs_ptr + o_z, z, mask=m_z)
            tl.store(activated_ptr + o_z, a, mask=m_z)
            if HEADS > 0:
                p_up = projected_up_ptr + ((i_tower * K + k) * R + o_r).to(tl.int64)[:, None] * HEADS + o_e[None, :]
                b_up = tl.load(p_up, mask=m_r[:, None], other=0.0)
                out = tl.dot(a.to(b_up.dtype), b_up, out, input_precision=PRECISION)
        tl.debug_barrier()  # the next layer reads what all threads of this program wrote
    if HEADS > 0:
        tl.store(p_out, out, mask=m_n[:, None])


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
    """Add a W_up + b_up to a tile [BM, BD] of out."""
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
