"""The Triton kernel of the fold's second backward launch: gradients of the heads, the gates and the up biases.

It reads what `fold_backward` wrote. fold_heads.py has the equations and launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fold_heads_kernels import at, gates


@triton.jit
def contract(
    rows_ptr,  # [ROWS, D]
    columns_ptr,  # [columns, D]
    row_bias_ptr,  # [ROWS]
    column_bias_ptr,  # [columns]
    out_ptr,
    out_stride,
    o_r,
    o_c,
    columns,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write a tile, at rows o_r and columns o_c of out, of rows columns^T + row_bias column_bias^T."""
    m_r, m_c = o_r < ROWS, o_c < columns
    total = tl.zeros((BM, BN), tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        b_rows = tl.load(rows_ptr + o_r[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0)
        b_columns = tl.load(columns_ptr + o_c[:, None] * D + o_d[None, :], mask=m_c[:, None] & m_d, other=0.0)
        total = tl.dot(b_rows, b_columns.T, total, input_precision=PRECISION)
    b_row_bias = tl.load(row_bias_ptr + o_r, mask=m_r, other=0.0)
    total += b_row_bias[:, None] * tl.load(column_bias_ptr + o_c, mask=m_c, other=0.0)[None, :]
    tl.store(out_ptr + o_r[:, None] * out_stride + o_c[None, :], total, mask=m_r[:, None] & m_c[None, :])


@triton.jit
def gate_gradients(
    weights_ptr,
    gradients_ptr,
    carries_ptr,  # [BK, BK] of the tower
    dots_ptr,  # [BK, BK] of the tower
    through_ptr,  # [BK, D] of the tower
    of_coefficients_ptr,  # [K, 3] of the tower
    gate,
    up_bias,
    first,  # 1 if the tower reads the first view
    second,
    TEMPERATURE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the gradients of a tower's gates, through the coefficients and through the carries c[k, j].

    c[k, j] times the gradient of c[k, j] is dots[k, j] + c[k, j] <through_k, b_up,j>. A carry is 1 - gate, so the
    derivative of log c[k, j] in the logit of a layer i with j < i <= k is -gate_i.
    """
    o_k = tl.arange(0, BK)
    is_intra = (first & second) == 0
    by_bias = tl.zeros((BK, BK), tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        b_through = tl.load(through_ptr + o_k[:, None] * D + o_d[None, :], mask=(o_k <= K)[:, None] & m_d, other=0.0)
        p_up_bias = weights_ptr + up_bias + o_k[:, None] * D + o_d[None, :]
        b_up_bias = tl.load(p_up_bias, mask=(o_k < K)[:, None] & m_d, other=0.0)
        by_bias = tl.dot(b_through, b_up_bias.T, by_bias, input_precision="ieee")
    is_pair = (o_k[None, :] < o_k[:, None]) & (o_k[:, None] <= K)
    o_pair = o_k[:, None] * BK + o_k[None, :]
    pairs = tl.load(dots_ptr + o_pair, mask=is_pair, other=0.0) + by_bias * tl.load(carries_ptr + o_pair)
    o_i = o_k[:, None, None]
    between = (o_i > o_k[None, None, :]) & (o_i <= o_k[None, :, None])
    through_carries = tl.sum(tl.sum(tl.where(between, pairs[None, :, :], 0.0), 2), 1)
    p_coefficients = of_coefficients_ptr + o_k * 3
    of_carry = tl.load(p_coefficients, mask=o_k < K, other=0.0)
    of_first = tl.load(p_coefficients + 1, mask=o_k < K, other=0.0) * first
    of_second = tl.load(p_coefficients + 2, mask=o_k < K, other=0.0) * second
    _, b_gate, b_rest = gates(weights_ptr, gate, o_k, TEMPERATURE, K)
    of_gate = of_first + tl.where(is_intra, of_second - of_carry, -of_second)
    of_logit = b_gate * b_rest * of_gate - tl.where(is_intra, b_gate * through_carries, 0.0)
    tl.store(gradients_ptr + gate + o_k, of_logit / TEMPERATURE, mask=o_k < K)


@triton.jit
def fold_chains_backward(
    weights_ptr,
    operands_ptr,
    gradients_ptr,
    carries_ptr,  # [T, BK, BK]
    folded_ptr,  # [T, PART, D]
    folded_bias_ptr,  # [T, PART]
    total_ptr,  # [T, DIM, D]: the projections' whole gradients
    of_folded_ptr,  # [T, PART, D]
    of_folded_bias_ptr,  # [T, PART]
    through_ptr,  # [T, BK, D]
    dots_ptr,  # [T, BK, BK]
    of_coefficients_ptr,  # [T, K, 3]
    of_vector_bias_ptr,  # [DIM]
    FUSION: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    INNER_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    UP_BIAS: tl.constexpr,
    HIDDEN: tl.constexpr,
    MOST_HIDDEN: tl.constexpr,
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
    BPART: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """Run one task of a tower: gates; BD columns of the up biases; or a tile of middle, of outer, or of inner.

    The first tile of each column of middle also writes a tile of inner's bias.
    """
    i_tower = tl.program_id(0)
    i_part = tl.program_id(1)
    hidden = at(HIDDEN, i_tower)
    middle, up_bias = at(MIDDLE, i_tower), at(UP_BIAS, i_tower)
    c_ptr = carries_ptr + i_tower * BK * BK
    end_of_up_bias = 1 + tl.cdiv(D, BD)
    end_of_middle = end_of_up_bias + tl.cdiv(PART, BM) * tl.cdiv(MOST_HIDDEN, BN)
    end_of_outer = end_of_middle + tl.cdiv(DIM, BM) * tl.cdiv(PART, BN)
    if i_part == 0:
        if GATED:
            gate_gradients(
                weights_ptr,
                gradients_ptr,
                c_ptr,
                dots_ptr + i_tower * BK * BK,
                through_ptr + i_tower * BK * D,
                of_coefficients_ptr + i_tower * K * 3,
                at(GATE, i_tower),
                up_bias,
                (FIRST_TOWERS >> i_tower) & 1,
                (SECOND_TOWERS >> i_tower) & 1,
                TEMPERATURE,
                K,
                BK,
                D,
                BD,
            )
    elif i_part < end_of_up_bias:
        o_c = (i_part - 1) * BD + tl.arange(0, BD)
        o_k = tl.arange(0, BK)
        b_carries = tl.load(c_ptr + o_k[:, None] * BK + o_k[None, :])
        p_through = through_ptr + (i_tower * BK + o_k[:, None]) * D + o_c[None, :]
        b_through = tl.load(p_through, mask=(o_k <= K)[:, None] & (o_c < D)[None, :], other=0.0)
        of_up_bias = tl.dot(b_carries.T, b_through, input_precision="ieee")
        p_up_bias = gradients_ptr + up_bias + o_k[:, None] * D + o_c[None, :]
        tl.store(p_up_bias, of_up_bias, mask=(o_k < K)[:, None] & (o_c < D)[None, :])
    elif i_part < end_of_middle:
        i_tile = i_part - end_of_up_bias
        o_f = i_tile % tl.cdiv(PART, BM) * BM + tl.arange(0, BM)
        o_h = i_tile // tl.cdiv(PART, BM) * BN + tl.arange(0, BN)
        if i_tile // tl.cdiv(PART, BM) * BN < hidden:
            contract(
                of_folded_ptr + i_tower * PART * D,
                operands_ptr + at(INNER, i_tower),
                of_folded_bias_ptr + i_tower * PART,
                weights_ptr + at(INNER_BIAS, i_tower),
                gradients_ptr + middle,
                hidden,
                o_f,
                o_h,
                hidden,
                PART,
                D,
                PRECISION,
                BM,
                BN,
                BD,
            )
            if i_tile % tl.cdiv(PART, BM) == 0:
                total = tl.zeros((BN,), tl.float32)
                for i_f in range(0, PART, 16):
                    o_part = i_f + tl.arange(0, 16)
                    p_middle = weights_ptr + middle + o_part[:, None] * hidden + o_h[None, :]
                    b_middle = tl.load(p_middle, mask=(o_part < PART)[:, None] & (o_h < hidden)[None, :], other=0.0)
                    b_bias = tl.load(of_folded_bias_ptr + i_tower * PART + o_part, mask=o_part < PART, other=0.0)
                    total += tl.sum(b_middle * b_bias[:, None], 0)
                tl.store(gradients_ptr + at(INNER_BIAS, i_tower) + o_h, total, mask=o_h < hidden)
    elif i_part < end_of_outer:
        i_tile = i_part - end_of_middle
        contract(
            total_ptr + i_tower * DIM * D,
            folded_ptr + i_tower * PART * D,
            of_vector_bias_ptr,
            folded_bias_ptr + i_tower * PART,
            gradients_ptr + FUSION + i_tower * PART,
            TOWERS * PART,
            i_tile // tl.cdiv(PART, BN) * BM + tl.arange(0, BM),
            i_tile % tl.cdiv(PART, BN) * BN + tl.arange(0, BN),
            PART,
            DIM,
            D,
            PRECISION,
            BM,
            BN,
            BD,
        )
    else:
        i_tile = i_part - end_of_outer
        i_h = i_tile // tl.cdiv(D, BD) * BH
        if i_h < hidden:
            o_h = i_h + tl.arange(0, BH)
            o_d = i_tile % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
            m_h, m_d = o_h < hidden, o_d < D
            total = tl.zeros((BH, BD), tl.float32)
            for i_f in range(0, PART, BM):
                o_f = i_f + tl.arange(0, BM)
                m_f = (o_f < PART)[:, None]
                p_middle = operands_ptr + middle + o_f[:, None] * hidden + o_h[None, :]
                b_middle = tl.load(p_middle, mask=m_f & m_h[None, :], other=0.0)
                p_of_folded = of_folded_ptr + (i_tower * PART + o_f[:, None]) * D + o_d[None, :]
                b_of_folded = tl.load(p_of_folded, mask=m_f & m_d[None, :], other=0.0)
                total = tl.dot(b_middle.T, b_of_folded, total, input_precision=PRECISION)
            p_inner = gradients_ptr + at(INNER, i_tower) + o_h[:, None] * D + o_d[None, :]
            tl.store(p_inner, total, mask=m_h[:, None] & m_d[None, :])
