"""The Triton kernels of the fold's first backward launch. fold_heads.py has the equations and launches them.

of_x is the gradient of x. `through` [T, BK, D] has, for each layer k, of_bias_k^T W_down,k, and for k = K
of_vector_bias^T P: the gradient of the up biases before the carries. `dots` [T, BK, BK] has the dot product of each
pair's composites, or projected_up, with its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fold_heads_kernels import at, pair_of_layers


@triton.jit
def down_gradients(
    weights_ptr,
    operands_ptr,
    gradients_ptr,
    carries_ptr,  # [BK, BK] of the tower
    of_down_ptr,  # [K, R, D] of the tower
    of_bias_ptr,  # [K, R] of the tower
    of_composites_ptr,  # [K, R, K, R] of the tower
    down,
    up,
    up_bias,
    k,
    o_r,
    o_d,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write rows o_r and columns o_d of the gradient of W_down,k.

    It is of_down_k + sum over j < k of c[k, j] (of_composites[k, j] W_up,j^T + of_bias_k b_up,j^T).
    """
    m_r, m_d = o_r < R, o_d < D
    total = tl.zeros((BR, BD), tl.float32)
    up_biases = tl.zeros((BD,), tl.float32)  # the sum over j < k of c[k, j] b_up,j
    for step in range(0, k * tl.cdiv(R, BR)):
        j = step // tl.cdiv(R, BR)
        o_c = step % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
        m_c = o_c < R
        p_gradient = of_composites_ptr + ((k * R + o_r[:, None]) * K + j) * R + o_c[None, :]
        b_gradient = tl.load(p_gradient, mask=m_r[:, None] & m_c[None, :], other=0.0)
        p_up = operands_ptr + up + (j * D + o_d[:, None]) * R + o_c[None, :]
        b_up = tl.load(p_up, mask=m_d[:, None] & m_c[None, :], other=0.0)
        carry = tl.load(carries_ptr + k * BK + j)
        b_gradient *= carry
        total = tl.dot(b_gradient.to(b_up.dtype), b_up.T, total, input_precision=PRECISION)
        b_up_bias = tl.load(weights_ptr + up_bias + j * D + o_d, mask=m_d, other=0.0)
        up_biases += tl.where(step % tl.cdiv(R, BR) == 0, carry, 0.0) * b_up_bias
    total += tl.load(of_bias_ptr + k * R + o_r, mask=m_r, other=0.0)[:, None] * up_biases[None, :]
    o_down = (k * R + o_r[:, None]) * D + o_d[None, :]
    mask = m_r[:, None] & m_d[None, :]
    total += tl.load(of_down_ptr + o_down, mask=mask, other=0.0)
    tl.store(gradients_ptr + down + o_down, total, mask=mask)


@triton.jit
def projection_gradients(
    weights_ptr,
    operands_ptr,
    carries_ptr,  # [BK] of the tower's row K
    of_projected_up_ptr,  # [K, R, DIM] of the tower
    of_projections_ptr,  # [DIM, D] of the tower
    of_vector_bias_ptr,  # [DIM]
    total_ptr,  # [DIM, D] of the tower
    of_folded_ptr,  # [PART, D] of the tower
    outer,  # offset of the tower's columns of fusion
    up,
    up_bias,
    o_d,
    OUTER_STRIDE: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    BPART: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write columns o_d of the whole gradient of a tower's P, and of of_folded, which is outer^T times it."""
    o_f = tl.arange(0, BPART)
    m_f, m_d = o_f < PART, o_d < D
    of_folded = tl.zeros((BPART, BD), tl.float32)
    for i_e in range(0, DIM, BR):
        o_e = i_e + tl.arange(0, BR)
        m_e = o_e < DIM
        total = tl.zeros((BR, BD), tl.float32)
        up_biases = tl.zeros((BD,), tl.float32)
        for step in range(0, K * tl.cdiv(R, BR)):
            j = step // tl.cdiv(R, BR)
            o_c = step % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
            m_c = o_c < R
            p_gradient = of_projected_up_ptr + (j * R + o_c[:, None]) * DIM + o_e[None, :]
            b_gradient = tl.load(p_gradient, mask=m_c[:, None] & m_e[None, :], other=0.0)
            p_up = operands_ptr + up + (j * D + o_d[:, None]) * R + o_c[None, :]
            b_up = tl.load(p_up, mask=m_d[:, None] & m_c[None, :], other=0.0)
            carry = tl.load(carries_ptr + j)
            b_gradient *= carry
            total = tl.dot(b_gradient.to(b_up.dtype).T, b_up.T, total, input_precision=PRECISION)
            b_up_bias = tl.load(weights_ptr + up_bias + j * D + o_d, mask=m_d, other=0.0)
            up_biases += tl.where(step % tl.cdiv(R, BR) == 0, carry, 0.0) * b_up_bias
        total += tl.load(of_vector_bias_ptr + o_e, mask=m_e, other=0.0)[:, None] * up_biases[None, :]
        o_total = o_e[:, None] * D + o_d[None, :]
        mask = m_e[:, None] & m_d[None, :]
        total += tl.load(of_projections_ptr + o_total, mask=mask, other=0.0)
        b_total = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + o_total, b_total, mask=mask)
        p_outer = operands_ptr + outer + o_e[:, None] * OUTER_STRIDE + o_f[None, :]
        b_outer = tl.load(p_outer, mask=m_e[:, None] & m_f[None, :], other=0.0)
        of_folded = tl.dot(b_outer.T, b_total, of_folded, input_precision=PRECISION)
    tl.store(of_folded_ptr + o_f[:, None] * D + o_d[None, :], of_folded, mask=m_f[:, None] & m_d[None, :])


@triton.jit
def up_gradients(
    operands_ptr,
    gradients_ptr,
    projection_ptr,  # [DIM, D] of the tower
    carries_ptr,  # [BK, BK] of the tower
    of_composites_ptr,  # [K, R, K, R] of the tower
    of_projected_up_ptr,  # [K, R, DIM] of the tower
    down,
    up,
    j,
    o_c,
    o_d,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write columns o_c and rows o_d of the gradient of W_up,j.

    It is c[K - 1, j] P^T of_projected_up_j^T + sum over k > j of c[k, j] W_down,k^T of_composites[k, j].
    """
    m_c, m_d = o_c < R, o_d < D
    total = tl.zeros((BD, BR), tl.float32)
    for i_e in range(0, DIM, BR):
        o_e = i_e + tl.arange(0, BR)
        m_e = o_e < DIM
        p_gradient = of_projected_up_ptr + (j * R + o_c[:, None]) * DIM + o_e[None, :]
        b_gradient = tl.load(p_gradient, mask=m_c[:, None] & m_e[None, :], other=0.0)
        p_projection = projection_ptr + o_e[:, None] * D + o_d[None, :]
        b_projection = tl.load(p_projection, mask=m_e[:, None] & m_d[None, :], other=0.0)
        b_gradient *= tl.load(carries_ptr + K * BK + j)
        total = tl.dot(b_projection.T, b_gradient.to(b_projection.dtype).T, total, input_precision=PRECISION)
    for step in range(0, (K - 1 - j) * tl.cdiv(R, BR)):
        k = j + 1 + step // tl.cdiv(R, BR)
        o_r = step % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
        m_r = o_r < R
        p_gradient = of_composites_ptr + ((k * R + o_r[:, None]) * K + j) * R + o_c[None, :]
        b_gradient = tl.load(p_gradient, mask=m_r[:, None] & m_c[None, :], other=0.0)
        p_down = operands_ptr + down + (k * R + o_r[:, None]) * D + o_d[None, :]
        b_down = tl.load(p_down, mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_gradient *= tl.load(carries_ptr + k * BK + j)
        total = tl.dot(b_down.T, b_gradient.to(b_down.dtype), total, input_precision=PRECISION)
    p_total = gradients_ptr + up + (j * D + o_d[:, None]) * R + o_c[None, :]
    tl.store(p_total, total, mask=m_d[:, None] & m_c[None, :])


@triton.jit
def through_rows(
    matrix_ptr,  # [ROWS, COLUMNS]
    of_rows_ptr,  # [ROWS]
    o_c,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    BR: tl.constexpr,
):
    """Return columns o_c of the vector of_rows^T matrix."""
    m_c = o_c < COLUMNS
    total = tl.zeros(o_c.shape, tl.float32)
    for i_r in range(0, ROWS, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < ROWS
        b_matrix = tl.load(matrix_ptr + o_r[:, None] * STRIDE + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0)
        total += tl.sum(b_matrix * tl.load(of_rows_ptr + o_r, mask=m_r, other=0.0)[:, None], 0)
    return total


@triton.jit
def dot_of_pair(
    first_ptr, second_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, BR: tl.constexpr
):
    """Return the sum over all elements of the product of two matrices."""
    total = tl.zeros((BR, BR), tl.float32)
    for i_r in range(0, ROWS, BR):
        for i_c in range(0, COLUMNS, BR):
            o_r, o_c = i_r + tl.arange(0, BR), i_c + tl.arange(0, BR)
            o_element = o_r[:, None] * STRIDE + o_c[None, :]
            mask = (o_r < ROWS)[:, None] & (o_c < COLUMNS)[None, :]
            b_second = tl.load(second_ptr + o_element, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(first_ptr + o_element, mask=mask, other=0.0) * b_second
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def bias_gradients(
    weights_ptr,
    gradients_ptr,
    projections_ptr,  # [T, DIM, D]
    of_bias_ptr,  # [T, K, R]
    of_vector_bias_ptr,  # [DIM]
    through_ptr,  # [T, BK, D]
    i_tower,
    k,
    i_d,
    DOWN: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write columns of `through` of layer k, or of vector_bias for k = K; copy of_bias to the gradient of b_down,k."""
    o_d = i_d + tl.arange(0, BD)
    if k < K:
        of_rows_ptr = of_bias_ptr + (i_tower * K + k) * R
        b_through = through_rows(weights_ptr + at(DOWN, i_tower) + k * R * D, of_rows_ptr, o_d, R, D, D, BR)
        if i_d == 0:
            for i_r in range(0, R, BR):
                o_r = i_r + tl.arange(0, BR)
                b_bias = tl.load(of_rows_ptr + o_r, mask=o_r < R, other=0.0)
                tl.store(gradients_ptr + at(DOWN_BIAS, i_tower) + k * R + o_r, b_bias, mask=o_r < R)
    else:
        b_through = through_rows(projections_ptr + i_tower * DIM * D, of_vector_bias_ptr, o_d, DIM, D, D, BR)
    tl.store(through_ptr + (i_tower * BK + k) * D + o_d, b_through, mask=o_d < D)


@triton.jit
def fold_backward(
    weights_ptr,
    operands_ptr,
    gradients_ptr,
    projections_ptr,  # [T, DIM, D]
    projection_operands_ptr,  # [T, DIM, D]
    carries_ptr,  # [T, BK, BK]
    composites_ptr,  # [T, K, R, K, R]
    projected_up_ptr,  # [T, K, R, DIM]
    of_down_ptr,  # [T, K, R, D]
    of_bias_ptr,  # [T, K, R]
    of_composites_ptr,  # [T, K, R, K, R]
    of_projected_up_ptr,  # [T, K, R, DIM]
    of_projections_ptr,  # [T, DIM, D]
    of_vector_bias_ptr,  # [DIM]
    total_ptr,  # [T, DIM, D]: the projections' whole gradients
    of_folded_ptr,  # [T, PART, D]
    of_folded_bias_ptr,  # [T, PART]
    through_ptr,  # [T, BK, D]
    dots_ptr,  # [T, BK, BK]
    FUSION: tl.constexpr,
    FUSION_BIAS: tl.constexpr,
    MIDDLE_BIAS: tl.constexpr,
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
    BD: tl.constexpr,
):
    """Run one task of a tower.

    The tasks are: columns of the projection's gradient; a tile of W_down; a tile of W_up; columns of `through` and the
    gradient of b_down; the `dots` of a pair of layers; the gradients of folded_bias, middle_bias and the fusion's bias.
    """
    i_tower = tl.program_id(0)
    i_part = tl.program_id(1)
    width_tiles = tl.cdiv(D, BD)
    tiles = tl.cdiv(R, BR) * width_tiles
    down, up, up_bias = at(DOWN, i_tower), at(UP, i_tower), at(UP_BIAS, i_tower)
    o_d = i_part % width_tiles * BD + tl.arange(0, BD)
    end_of_down = width_tiles + K * tiles
    end_of_up = end_of_down + K * tiles
    end_of_through = end_of_up + (K + 1) * width_tiles
    end_of_pairs = end_of_through + K * (K + 1) // 2
    c_ptr = carries_ptr + i_tower * BK * BK
    of_composites_ptr += i_tower * K * R * K * R
    of_projected_up_ptr += i_tower * K * R * DIM
    if i_part < width_tiles:
        projection_gradients(
            weights_ptr,
            operands_ptr,
            c_ptr + K * BK,
            of_projected_up_ptr,
            of_projections_ptr + i_tower * DIM * D,
            of_vector_bias_ptr,
            total_ptr + i_tower * DIM * D,
            of_folded_ptr + i_tower * PART * D,
            FUSION + i_tower * PART,
            up,
            up_bias,
            o_d,
            TOWERS * PART,
            K,
            R,
            D,
            DIM,
            PART,
            BPART,
            PRECISION,
            BR,
            BD,
        )
    elif i_part < end_of_down:
        i_tile = (i_part - width_tiles) // width_tiles
        down_gradients(
            weights_ptr,
            operands_ptr,
            gradients_ptr,
            c_ptr,
            of_down_ptr + i_tower * K * R * D,
            of_bias_ptr + i_tower * K * R,
            of_composites_ptr,
            down,
            up,
            up_bias,
            K - 1 - i_tile // tl.cdiv(R, BR),  # the layers with most products first
            i_tile % tl.cdiv(R, BR) * BR + tl.arange(0, BR),
            o_d,
            K,
            BK,
            R,
            D,
            PRECISION,
            BR,
            BD,
        )
    elif i_part < end_of_up:
        i_tile = (i_part - end_of_down) // width_tiles
        up_gradients(
            operands_ptr,
            gradients_ptr,
            projection_operands_ptr + i_tower * DIM * D,
            c_ptr,
            of_composites_ptr,
            of_projected_up_ptr,
            down,
            up,
            i_tile // tl.cdiv(R, BR),
            i_tile % tl.cdiv(R, BR) * BR + tl.arange(0, BR),
            o_d,
            K,
            BK,
            R,
            D,
            DIM,
            PRECISION,
            BR,
            BD,
        )
    elif i_part < end_of_through:
        bias_gradients(
            weights_ptr,
            gradients_ptr,
            projections_ptr,
            of_bias_ptr,
            of_vector_bias_ptr,
            through_ptr,
            i_tower,
            (i_part - end_of_up) // width_tiles,
            i_part % width_tiles * BD,
            DOWN,
            DOWN_BIAS,
            K,
            BK,
            R,
            D,
            DIM,
            BR,
            BD,
        )
    elif i_part < end_of_pairs:
        k, j = pair_of_layers(i_part - end_of_through, K)
        if k < K:
            at_pair = (k * R * K + j) * R
            first_ptr = composites_ptr + i_tower * K * R * K * R + at_pair
            dot = dot_of_pair(of_composites_ptr + at_pair, first_ptr, R, R, K * R, BR)
        else:
            at_pair = j * R * DIM
            first_ptr = projected_up_ptr + i_tower * K * R * DIM + at_pair
            dot = dot_of_pair(of_projected_up_ptr + at_pair, first_ptr, R, DIM, DIM, BR)
        tl.store(dots_ptr + (i_tower * BK + k) * BK + j, dot)
    else:
        o_f = tl.arange(0, BPART)
        b_bias = through_rows(
            weights_ptr + FUSION + i_tower * PART, of_vector_bias_ptr, o_f, DIM, PART, TOWERS * PART, 16
        )
        tl.store(of_folded_bias_ptr + i_tower * PART + o_f, b_bias, mask=o_f < PART)
        tl.store(gradients_ptr + at(MIDDLE_BIAS, i_tower) + o_f, b_bias, mask=o_f < PART)
        if i_tower == 0:
            for i_e in range(0, DIM, BR):
                o_e = i_e + tl.arange(0, BR)
                b_fusion_bias = tl.load(of_vector_bias_ptr + o_e, mask=o_e < DIM, other=0.0)
                tl.store(gradients_ptr + FUSION_BIAS + o_e, b_fusion_bias, mask=o_e < DIM)
