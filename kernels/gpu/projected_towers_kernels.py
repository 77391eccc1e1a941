"""The Triton kernels that only projected_towers.py launches; the others are in side_towers_*kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .side_towers_kernels import true_count


@triton.jit
def join(
    towers_ptr,  # [T, N, d]
    bias_ptr,  # [d]
    vectors_ptr,  # [N, d]
    operands_ptr,  # [N, d]: vectors in the products' dtype; not written if that is fp32
    count_ptr,
    N,
    HEADS: tl.constexpr,
    TOWERS: tl.constexpr,
    BM: tl.constexpr,
):
    """Write BM vectors: the sum of the towers' parts and the bias; vectors beyond the true count are 0."""
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, HEADS)
    m_n, is_item = (o_n < N)[:, None], (o_n < true_count(count_ptr, N, True))[:, None]
    o_vector = o_n.to(tl.int64)[:, None] * HEADS + o_e[None, :]
    total = tl.zeros((BM, HEADS), tl.float32) + tl.load(bias_ptr + o_e)[None, :]
    for i_tower in tl.static_range(TOWERS):
        p_tower = towers_ptr + tl.cast(i_tower, tl.int64) * N * HEADS
        total += tl.load(p_tower + o_vector, mask=is_item, other=0.0)
    total = tl.where(is_item, total, 0.0)
    tl.store(vectors_ptr + o_vector, total, mask=m_n)
    if operands_ptr.dtype.element_ty != tl.float32:
        tl.store(operands_ptr + o_vector, total, mask=m_n)


@triton.jit
def composite_gradients(
    dz_ptr, a_ptr, composites_ptr, first_tile, last_tile, count, o_r, o_j, o_k, o_below,
    K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write a block [BR, BR] of dz_k^T a_j of one tower; o_k = k R and o_below = j R are the layers' first columns."""
    m_r, m_j = o_r < R, o_j < R
    total = tl.zeros((BR, BR), tl.float32)
    for i_tile in range(first_tile, last_tile):
        o_n = i_tile * BM + tl.arange(0, BM)
        m_n = (o_n < count)[:, None]
        o_item = o_n.to(tl.int64)[:, None] * (K * R)
        b_dz = tl.load(dz_ptr + o_item + o_k + o_r[None, :], mask=m_n & m_r[None, :], other=0.0)
        b_a = tl.load(a_ptr + o_item + o_below + o_j[None, :], mask=m_n & m_j[None, :], other=0.0)
        total = tl.dot(b_dz.T, b_a, total, input_precision=PRECISION)
    p_composites = composites_ptr + (o_k + o_r).to(tl.int64)[:, None] * (K * R) + o_below + o_j[None, :]
    tl.store(p_composites, total, mask=m_r[:, None] & m_j[None, :])


@triton.jit
def output_gradients(
    dz_ptr, a_ptr, dy_ptr, projected_up_ptr, bias_ptr, vector_bias_ptr, first_tile, last_tile, count, o_r, o_k,
    writes_vector_bias,
    HEADS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write BR rows of a_k^T dy and the sums of dz_k of one tower; if writes_vector_bias, also the sums of dy."""
    m_r = o_r < R
    o_e = tl.arange(0, HEADS)
    of_up = tl.zeros((BR, HEADS), tl.float32)
    of_bias = tl.zeros((BM, BR), tl.float32)
    of_vector_bias = tl.zeros((BM, HEADS), tl.float32)
    for i_tile in range(first_tile, last_tile):
        o_n = i_tile * BM + tl.arange(0, BM)
        m_n = (o_n < count)[:, None]
        o_hidden = o_n.to(tl.int64)[:, None] * (K * R) + o_k + o_r[None, :]
        b_a = tl.load(a_ptr + o_hidden, mask=m_n & m_r[None, :], other=0.0)
        of_bias += tl.load(dz_ptr + o_hidden, mask=m_n & m_r[None, :], other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + o_n.to(tl.int64)[:, None] * HEADS + o_e[None, :], mask=m_n, other=0.0)
        of_vector_bias += dy
        of_up = tl.dot(b_a.T, dy.to(b_a.dtype), of_up, input_precision=PRECISION)
    p_up = projected_up_ptr + (o_k + o_r).to(tl.int64)[:, None] * HEADS + o_e[None, :]
    tl.store(p_up, of_up, mask=m_r[:, None])
    tl.store(bias_ptr + o_k + o_r, tl.sum(of_bias, 0), mask=m_r)
    tl.store(vector_bias_ptr + o_e, tl.sum(of_vector_bias, 0), mask=o_e < tl.where(writes_vector_bias, HEADS, 0))


@triton.jit(do_not_specialize=["N"])
def hidden_gradients(
    bottlenecks_ptr,  # [T, N, K, R]: dz
    activated_ptr,  # [T, N, K, R]: a
    of_vectors_ptr,  # [N, d]: dy
    composites_ptr,  # [S, T, K, R, K, R]: written where the second layer lies below the first
    projected_up_ptr,  # [S, T, K, R, d]
    bias_ptr,  # [S, T, K, R]
    vector_bias_ptr,  # [S, d]
    part_stride,  # from split to split
    count_ptr,
    N,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
):
    """Write a split's parts of the gradients that need no hidden states.

    A program takes two blocks of a tower's bottlenecks. Blocks of layers k > j give dz_k^T a_j. A block and the
    first block of its own layer give the gradients of projected_up, bias and vector_bias. Other pairs write nothing.
    """
    BLOCKS: tl.constexpr = (R + BR - 1) // BR
    left, right = tl.program_id(0) // (K * BLOCKS), tl.program_id(0) % (K * BLOCKS)
    i_k, i_j = left // BLOCKS, right // BLOCKS
    if i_j > i_k:
        return
    if (i_j == i_k) & (right % BLOCKS > 0):
        return
    i_tower = tl.program_id(1).to(tl.int64)
    o_r = (left % BLOCKS) * BR + tl.arange(0, BR)
    o_j = (right % BLOCKS) * BR + tl.arange(0, BR)
    count = true_count(count_ptr, N, True)
    tiles = tl.cdiv(count, BM)
    of_split = tl.cdiv(tiles, tl.num_programs(2))
    first_tile = tl.program_id(2) * of_split
    last_tile = tl.minimum(first_tile + of_split, tiles)
    o_split = tl.program_id(2).to(tl.int64) * part_stride
    p_dz = bottlenecks_ptr + i_tower * N * K * R
    p_a = activated_ptr + i_tower * N * K * R
    if i_j < i_k:
        p_composites = composites_ptr + o_split + i_tower * (K * R * K * R)
        composite_gradients(
            p_dz, p_a, p_composites, first_tile, last_tile, count, o_r, o_j, i_k * R, i_j * R, K, R, BR, PRECISION, BM
        )
    else:
        output_gradients(
            p_dz, p_a, of_vectors_ptr, projected_up_ptr + o_split + i_tower * (K * R * HEADS),
            bias_ptr + o_split + i_tower * (K * R), vector_bias_ptr + o_split, first_tile, last_tile, count, o_r,
            i_k * R, (left == 0) & (i_tower == 0), HEADS, K, R, BR, PRECISION, BM,
        )  # fmt: skip


@triton.jit
def sum_gradients(
    parts_ptr,  # [S, total]
    gradients_ptr,  # [total]
    mix_parts_ptr,  # [tiles * WIDTH_PROGRAMS, C], C = T * K * 3
    coefficients_ptr,  # [C]
    total,
    count_ptr,
    N,
    S: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,  # items in a tile of `mix_gradients`
    WIDTH_PROGRAMS: tl.constexpr,  # programs of `mix_gradients` over the width
    BLOCK: tl.constexpr,
    BP: tl.constexpr,
):
    """Write sums of parts in a fixed order: the last program the coefficients' gradient, others BLOCK elements each.

    Without gates the coefficients' gradient is 0.
    """
    if tl.program_id(0) < tl.cdiv(total, BLOCK):
        o_element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        m_element = o_element < total
        sums = tl.zeros((BLOCK,), tl.float32)
        for i_split in tl.static_range(S):
            p_split = parts_ptr + tl.cast(i_split, tl.int64) * total + o_element
            sums += tl.load(p_split, mask=m_element, other=0.0)
        tl.store(gradients_ptr + o_element, sums, mask=m_element)
    else:
        parts = 0
        if GATED:
            parts = tl.cdiv(true_count(count_ptr, N, True), TILE) * WIDTH_PROGRAMS
        o_c = tl.arange(0, BC)
        coefficients = tl.zeros((BP, BC), tl.float32)
        for i_part in range(0, parts, BP):
            o_part = i_part + tl.arange(0, BP)
            m_part = (o_part < parts)[:, None] & (o_c < C)[None, :]
            p_part = mix_parts_ptr + o_part.to(tl.int64)[:, None] * C + o_c[None, :]
            coefficients += tl.load(p_part, mask=m_part, other=0.0)
        tl.store(coefficients_ptr + o_c, tl.sum(coefficients, 0), mask=o_c < C)
