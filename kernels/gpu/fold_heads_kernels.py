"""The Triton kernels of the fold's forward. fold_heads.py has the equations and launches them.

Weights lie in flat buffers: weights_ptr in fp32, operands_ptr in the products' dtype. Uppercase names such as DOWN are
tuples with the offset of each tower's weights in these buffers. BK, BDIM and BPART are K + 1, DIM and PART rounded up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at(BY_TOWER: tl.constexpr, i_tower):
    """Return entry i_tower of a tuple of integers."""
    entry = BY_TOWER[0]
    for t in tl.static_range(1, len(BY_TOWER)):
        entry = tl.where(i_tower == t, BY_TOWER[t], entry)
    return entry


@triton.jit
def pair_of_layers(i_pair, K: tl.constexpr):
    """Return (k, j) of pair number i_pair, where j < k <= K, in the order (1, 0), (2, 0), (2, 1), (3, 0), ..."""
    k = 1
    for later in tl.static_range(2, K + 1):
        k = tl.where(i_pair >= later * (later - 1) // 2, later, k)
    return k, i_pair - k * (k - 1) // 2


@triton.jit
def gates(weights_ptr, gate, o_k, TEMPERATURE: tl.constexpr, K: tl.constexpr):
    """Return (logits, sigmoid(logits), sigmoid(-logits)) of layers o_k; the logit is 0 for o_k >= K."""
    logits = tl.load(weights_ptr + gate + o_k, mask=o_k < K, other=0.0) / TEMPERATURE
    small = tl.exp(-tl.abs(logits))
    larger, smaller = 1 / (1 + small), small / (1 + small)
    return logits, tl.where(logits > 0, larger, smaller), tl.where(logits > 0, smaller, larger)


@triton.jit
def mix(
    weights_ptr,
    coefficients_ptr,  # [T, K, 3]
    carries_ptr,  # [T, BK, BK]
    i_tower,
    GATE: tl.constexpr,
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    GATED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
):
    """Write a tower's coefficients [K, 3] and its carries c[k, j] for j < k <= K, 0 elsewhere."""
    o_k = tl.arange(0, BK)
    first = (FIRST_TOWERS >> i_tower) & 1
    second = (SECOND_TOWERS >> i_tower) & 1
    is_intra = (first & second) == 0
    b_carry = tl.full((BK,), 1.0, tl.float32)
    b_first = b_carry * first
    b_second = b_carry * second
    b_log_carry = b_carry * 0.0
    if GATED:
        logits, gate, rest = gates(weights_ptr, at(GATE, i_tower), o_k, TEMPERATURE, K)
        log_rest = tl.minimum(-logits, 0.0) - tl.log(1 + tl.exp(-tl.abs(logits)))
        b_log_carry = tl.where(is_intra & (o_k < K), log_rest, 0.0)
        b_carry = tl.where(is_intra, rest, 1.0)
        b_first = gate * first
        b_second = tl.where(is_intra, gate, rest) * second
    p_coefficients = coefficients_ptr + (i_tower * K + o_k) * 3
    tl.store(p_coefficients, b_carry, mask=o_k < K)
    tl.store(p_coefficients + 1, b_first, mask=o_k < K)
    tl.store(p_coefficients + 2, b_second, mask=o_k < K)
    o_i, o_j = o_k[None, None, :], o_k[None, :, None]
    between = (o_i > o_j) & (o_i <= o_k[:, None, None])
    b_carries = tl.exp(tl.sum(tl.where(between, b_log_carry[None, None, :], 0.0), 2))
    is_pair = (o_k[None, :] < o_k[:, None]) & (o_k[:, None] <= K)
    p_carries = carries_ptr + (i_tower * BK + o_k[:, None]) * BK + o_k[None, :]
    tl.store(p_carries, tl.where(is_pair, b_carries, 0.0))


@triton.jit
def fold_chains(
    weights_ptr,
    operands_ptr,
    folded_ptr,  # [T, PART, D]
    folded_bias_ptr,  # [T, PART]
    projections_ptr,  # [T, DIM, D]
    projection_operands_ptr,  # [T, DIM, D]
    coefficients_ptr,  # [T, K, 3]
    carries_ptr,  # [T, BK, BK]
    FUSION: tl.constexpr,
    MIDDLE: tl.constexpr,
    MIDDLE_BIAS: tl.constexpr,
    INNER: tl.constexpr,
    INNER_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    HIDDEN: tl.constexpr,  # rows of each tower's inner map
    FIRST_TOWERS: tl.constexpr,
    SECOND_TOWERS: tl.constexpr,
    GATED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    BDIM: tl.constexpr,
    BPART: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Run one task of a tower: coefficients and carries; ROWS of folded_bias; or BD columns of folded and projections.

    folded = middle inner, projections = outer folded, folded_bias = middle inner_bias + middle_bias.
    """
    i_tower = tl.program_id(0)
    i_part = tl.program_id(1)
    hidden = at(HIDDEN, i_tower)
    middle = at(MIDDLE, i_tower)
    if i_part == 0:
        mix(
            weights_ptr,
            coefficients_ptr,
            carries_ptr,
            i_tower,
            GATE,
            FIRST_TOWERS,
            SECOND_TOWERS,
            GATED,
            TEMPERATURE,
            K,
            BK,
        )
    elif i_part <= tl.cdiv(PART, ROWS):
        o_r = (i_part - 1) * ROWS + tl.arange(0, ROWS)
        m_r = o_r < PART
        bias = tl.load(weights_ptr + at(MIDDLE_BIAS, i_tower) + o_r, mask=m_r, other=0.0)
        for i_h in range(0, hidden, COLUMNS):
            o_c = i_h + tl.arange(0, COLUMNS)
            m_c = o_c < hidden
            p_row = weights_ptr + middle + o_r[:, None] * hidden + o_c[None, :]
            b_rows = tl.load(p_row, mask=m_r[:, None] & m_c[None, :], other=0.0)
            b_inner_bias = tl.load(weights_ptr + at(INNER_BIAS, i_tower) + o_c, mask=m_c, other=0.0)
            bias += tl.sum(b_rows * b_inner_bias[None, :], 1)
        tl.store(folded_bias_ptr + i_tower * PART + o_r, bias, mask=m_r)
    else:
        o_d = (i_part - 1 - tl.cdiv(PART, ROWS)) * BD + tl.arange(0, BD)
        o_f, o_e = tl.arange(0, BPART), tl.arange(0, BDIM)
        m_d, m_f, m_e = o_d < D, o_f < PART, o_e < DIM
        folded = tl.zeros((BPART, BD), tl.float32)
        for i_h in range(0, hidden, BH):
            o_h = i_h + tl.arange(0, BH)
            m_h = o_h < hidden
            p_middle = operands_ptr + middle + o_f[:, None] * hidden + o_h[None, :]
            p_inner = operands_ptr + at(INNER, i_tower) + o_h[:, None] * D + o_d[None, :]
            b_middle = tl.load(p_middle, mask=m_f[:, None] & m_h[None, :], other=0.0)
            b_inner = tl.load(p_inner, mask=m_h[:, None] & m_d[None, :], other=0.0)
            folded = tl.dot(b_middle, b_inner, folded, input_precision=PRECISION)
        p_outer = operands_ptr + FUSION + (o_e[:, None] * TOWERS + i_tower) * PART + o_f[None, :]
        b_outer = tl.load(p_outer, mask=m_e[:, None] & m_f[None, :], other=0.0)
        b_folded = folded.to(b_outer.dtype)
        p_folded = folded_ptr + (i_tower * PART + o_f[:, None]) * D + o_d[None, :]
        tl.store(p_folded, b_folded, mask=m_f[:, None] & m_d[None, :])
        projection = tl.dot(b_outer, b_folded, input_precision=PRECISION)
        o_projection = (i_tower * DIM + o_e[:, None]) * D + o_d[None, :]
        m_projection = m_e[:, None] & m_d[None, :]
        tl.store(projections_ptr + o_projection, projection, mask=m_projection)
        tl.store(projection_operands_ptr + o_projection, projection, mask=m_projection)


@triton.jit
def mixed_up_bias(weights_ptr, up_bias, carries_ptr, o_d, K: tl.constexpr, D: tl.constexpr):
    """Return the sum over j of c[k, j] b_up,j at columns o_d; carries_ptr points to row k, which is 0 for j >= k."""
    total = tl.zeros(o_d.shape, tl.float32)
    for j in tl.static_range(K):
        b_up_bias = tl.load(weights_ptr + up_bias + j * D + o_d, mask=o_d < D, other=0.0)
        total += tl.load(carries_ptr + j) * b_up_bias
    return total


@triton.jit
def multiply_layers(
    operands_ptr,
    projection_ptr,  # [DIM, D] of the tower: the map of layer K
    composites_ptr,  # [K, R, K, R] of the tower
    projected_up_ptr,  # [K, R, DIM] of the tower
    carries_ptr,  # [BK, BK] of the tower
    down,
    up,
    i_pair,
    i_r,
    i_c,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """Write a tile [BR, BC] of the product of two layers, c[k, j] W_down,k W_up,j, into composites.

    For k = K write c[K, j] (P W_up,j)^T into projected_up instead. (k, j) is pair number i_pair; the tile starts at row
    i_r and column i_c. down and up are the offsets of the tower's down- and up-projections in operands_ptr.
    """
    k, j = pair_of_layers(i_pair, K)
    rows = tl.where(k < K, R, DIM)
    if i_r < rows:
        o_r, o_c = i_r + tl.arange(0, BR), i_c + tl.arange(0, BC)
        m_r, m_c = o_r < rows, o_c < R
        matrix_ptr = operands_ptr + down + k * R * D if k < K else projection_ptr
        product = tl.zeros((BR, BC), tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = o_d < D
            b_matrix = tl.load(
                matrix_ptr + o_r[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0
            )
            p_up = operands_ptr + up + (j * D + o_d[:, None]) * R + o_c[None, :]
            b_up = tl.load(p_up, mask=m_d[:, None] & m_c[None, :], other=0.0)
            product = tl.dot(b_matrix, b_up, product, input_precision=PRECISION)
        product *= tl.load(carries_ptr + k * BK + j)
        mask = m_r[:, None] & m_c[None, :]
        if k < K:
            tl.store(composites_ptr + ((k * R + o_r[:, None]) * K + j) * R + o_c[None, :], product, mask=mask)
        else:
            tl.store(projected_up_ptr + (j * R + o_c[None, :]) * DIM + o_r[:, None], product, mask=mask)


@triton.jit
def rows_through(
    matrix_ptr,  # [ROWS_OF_MATRIX, D]
    weights_ptr,
    up_bias,
    carries_ptr,  # [BK]: row k of the tower
    o_r,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS_OF_MATRIX: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return rows o_r of a matrix times the sum over j of c[k, j] b_up,j."""
    m_r = o_r < ROWS_OF_MATRIX
    total = tl.zeros(o_r.shape, tl.float32)
    for i_d in range(0, D, COLUMNS):
        o_d = i_d + tl.arange(0, COLUMNS)
        up_biases = mixed_up_bias(weights_ptr, up_bias, carries_ptr, o_d, K, D)
        mask = m_r[:, None] & (o_d < D)[None, :]
        b_matrix = tl.load(matrix_ptr + o_r[:, None] * D + o_d[None, :], mask=mask, other=0.0)
        total += tl.sum(b_matrix * up_biases[None, :], 1)
    return total


@triton.jit
def fold_prepare(
    weights_ptr,
    operands_ptr,
    folded_bias_ptr,  # [T, PART]
    projections_ptr,  # [T, DIM, D]
    projection_operands_ptr,  # [T, DIM, D]
    carries_ptr,  # [T, BK, BK]
    composites_ptr,  # [T, K, R, K, R]
    projected_up_ptr,  # [T, K, R, DIM]
    bias_ptr,  # [T, K, R]
    vector_bias_ptr,  # [DIM]
    FUSION: tl.constexpr,
    FUSION_BIAS: tl.constexpr,
    DOWN: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    UP: tl.constexpr,
    UP_BIAS: tl.constexpr,
    TOWERS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    BPART: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Run one task of a tower: a tile of composites or projected_up, ROWS of a layer's bias, or ROWS of vector_bias.

    Only programs of tower 0 write vector_bias, which is the sum over all towers.
    """
    i_tower = tl.program_id(0)
    i_part = tl.program_id(1)
    column_tiles = tl.cdiv(R, BC)
    tiles = tl.cdiv(R if R > DIM else DIM, BR) * column_tiles
    end_of_products = K * (K + 1) // 2 * tiles
    end_of_biases = end_of_products + K * tl.cdiv(R, ROWS)
    c_ptr = carries_ptr + i_tower * BK * BK
    if i_part < end_of_products:
        multiply_layers(
            operands_ptr,
            projection_operands_ptr + i_tower * DIM * D,
            composites_ptr + i_tower * K * R * K * R,
            projected_up_ptr + i_tower * K * R * DIM,
            c_ptr,
            at(DOWN, i_tower),
            at(UP, i_tower),
            i_part // tiles,
            i_part % tiles // column_tiles * BR,
            i_part % column_tiles * BC,
            K,
            BK,
            R,
            D,
            DIM,
            PRECISION,
            BR,
            BC,
            BD,
        )
    elif i_part < end_of_biases:
        k = (i_part - end_of_products) // tl.cdiv(R, ROWS)
        o_r = (i_part - end_of_products) % tl.cdiv(R, ROWS) * ROWS + tl.arange(0, ROWS)
        p_down = weights_ptr + at(DOWN, i_tower) + k * R * D
        bias = rows_through(p_down, weights_ptr, at(UP_BIAS, i_tower), c_ptr + k * BK, o_r, K, D, R, COLUMNS)
        bias += tl.load(weights_ptr + at(DOWN_BIAS, i_tower) + k * R + o_r, mask=o_r < R, other=0.0)
        tl.store(bias_ptr + (i_tower * K + k) * R + o_r, bias, mask=o_r < R)
    elif i_tower == 0:
        o_e = (i_part - end_of_biases) * ROWS + tl.arange(0, ROWS)
        o_f = tl.arange(0, BPART)
        m_e = o_e < DIM
        bias = tl.load(weights_ptr + FUSION_BIAS + o_e, mask=m_e, other=0.0)
        for t in tl.static_range(TOWERS):
            p_outer = weights_ptr + FUSION + (o_e[:, None] * TOWERS + t) * PART + o_f[None, :]
            b_outer = tl.load(p_outer, mask=m_e[:, None] & (o_f < PART)[None, :], other=0.0)
            b_folded = tl.load(folded_bias_ptr + t * PART + o_f, mask=o_f < PART, other=0.0)
            bias += tl.sum(b_outer * b_folded[None, :], 1)
            p_projection = projections_ptr + t * DIM * D
            p_carries = carries_ptr + (t * BK + K) * BK
            bias += rows_through(p_projection, weights_ptr, UP_BIAS[t], p_carries, o_e, K, D, DIM, COLUMNS)
        tl.store(vector_bias_ptr + o_e, bias, mask=m_e)
