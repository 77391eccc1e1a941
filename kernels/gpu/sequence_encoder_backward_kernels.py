"""SASRec's backward in Triton: rows first, then the weights as sums over all rows in a fixed number of splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .sequence_encoder_kernels import (
    TILES,
    attention_weights,
    drop_factors,
    head_columns,
    load_rows,
    matrix,
    row_hash,
    stack_heads,
    unstack_heads,
    visible_keys,
    weight_factors,
)


@triton.jit
def _norm_backward(gradient, scale_ptr, p_normed, p_rstd, p_sums, D: tl.constexpr):
    """Return the gradient before a layer norm; stores the tile's part of the gradients of its scale and shift."""
    o_c = tl.arange(0, D)
    normed, rstd = tl.load(p_normed), tl.load(p_rstd)
    tl.store(p_sums + o_c, tl.sum(gradient * normed, 0))
    tl.store(p_sums + D + o_c, tl.sum(gradient, 0))
    gradient *= tl.load(scale_ptr + o_c)[None, :]
    mean = tl.sum(gradient, 1) * (1.0 / D)
    along = tl.sum(gradient * normed, 1) * (1.0 / D)
    return (gradient - mean[:, None] - normed * along[:, None]) * rstd[:, None]


@triton.jit
def _feed_backward(
    gradient,  # [BM, D] of the feed-forward's output, in the products' dtype
    dx,  # [BM, D]: what does not pass through the feed-forward
    p_operands,  # the block's weights
    p_factors,  # [BM, 1]: the rows' factors of the weights' gradients
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    FC: tl.constexpr,
):
    """Return the gradient before a block's feed-forward, and store the factors of its weights' gradients."""
    tl.store(p_factors + 15 * D + tl.arange(0, D)[None, :], gradient)
    for c in tl.static_range(0, 4 * D, FC):
        o_f = c + tl.arange(0, FC)[None, :]
        hidden = tl.load(p_factors + 11 * D + o_f)
        w = matrix(p_operands + 8 * D * D + 6 * D + c, 4 * D, D, FC)
        of_hidden = tl.dot(gradient, w, input_precision=PRECISION)
        of_hidden = tl.where(hidden > 0, of_hidden, 0.0).to(gradient.dtype)
        tl.store(p_factors + 7 * D + o_f, of_hidden)
        w = matrix(p_operands + 4 * D * D + 2 * D + c * D, D, FC, D)
        dx = tl.dot(of_hidden, w, dx, input_precision=PRECISION)
    return dx


@triton.jit
def _attention_backward(
    gradient,  # [BM, D] of the attention's output, in the products' dtype
    dx,  # [BM, D]: what does not pass through the attention
    p_operands,  # the block's weights
    p_factors,  # [BM, 1]: the rows' factors of the weights' gradients
    p_attended,  # [BM, 1]: the rows' queries, keys and values
    visible,  # bool [GROUP * BM, BM]
    hashed,  # [BM]: the rows at the site of the attention weights
    position,
    threshold,
    scale,
    P: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the gradient before a block's attention, and store the factors of its weights' gradients."""
    DTYPE: tl.constexpr = gradient.dtype
    SCALE: tl.constexpr = (D // HEADS) ** -0.5
    o_c = tl.arange(0, D)[None, :]
    tl.store(p_factors + 5 * D + o_c, gradient)
    da = tl.dot(gradient, matrix(p_operands + 3 * D * D, D, D, D), input_precision=PRECISION).to(DTYPE)
    q, k, v = tl.load(p_attended + o_c), tl.load(p_attended + D + o_c), tl.load(p_attended + 2 * D + o_c)
    dq, dk, dv = (tl.zeros((BM, D), tl.float32),) * 3
    for head in tl.static_range(0, HEADS, GROUP):
        columns = head_columns(head, D, HEADS, GROUP)
        stacked = stack_heads(q, columns, GROUP, BM, D)
        p = attention_weights(stacked, k, visible, SCALE, PRECISION)
        of_stacked = stack_heads(da, columns, GROUP, BM, D)
        dp = tl.dot(of_stacked, v.T, input_precision=PRECISION)
        dropped = p
        if DROP:
            factors = weight_factors(hashed, position, head, threshold, scale, P, GROUP, BM)
            dropped = p * factors
            dp *= factors
        dv = tl.dot(dropped.to(DTYPE).T, of_stacked, dv, input_precision=PRECISION)
        ds = (p * (dp - tl.sum(dp * p, 1)[:, None]) * SCALE).to(DTYPE)
        dk = tl.dot(ds.T, stacked, dk, input_precision=PRECISION)
        dq += unstack_heads(tl.dot(ds, k, input_precision=PRECISION), columns, GROUP, BM, D)
    q, k, v = dq.to(DTYPE), dk.to(DTYPE), dv.to(DTYPE)
    tl.store(p_factors + D + o_c, q)
    tl.store(p_factors + 2 * D + o_c, k)
    tl.store(p_factors + 3 * D + o_c, v)
    dx = tl.dot(q, matrix(p_operands, D, D, D), dx, input_precision=PRECISION)
    dx = tl.dot(k, matrix(p_operands + D * D, D, D, D), dx, input_precision=PRECISION)
    return tl.dot(v, matrix(p_operands + 2 * D * D, D, D, D), dx, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "first", "last", "threshold"])
def backward(
    gradient_ptr,  # fp32 [M, D]: of the states, or what a launch before this one wrote
    header_ptr,  # int32 [8]
    inputs_ptr,  # int32 [M]
    row_users_ptr,  # int32 [M]
    positions_ptr,  # int32 [M]
    users_ptr,  # int32 [U]
    operands_ptr,  # all weights one after the other, in the products' dtype
    weights_ptr,  # the same in fp32
    normed_ptr,  # fp32 [M, 1 + 2 BLOCKS, D]
    rstd_ptr,  # fp32 [1 + 2 BLOCKS, M]
    factors_ptr,  # [BLOCKS, M, 16 D]: see `weight_gradients`
    attended_ptr,  # [BLOCKS, M, 3 D]: queries, keys, values
    of_inputs_ptr,  # fp32 [M, D]
    sums_ptr,  # fp32 [tiles, (P + 2 + 4 BLOCKS) D]: each tile's part of the gradients of positions and norms
    M,
    first,  # block from the end, and the one after the last
    last,
    threshold,  # of dropout: a uint32 as int32
    scale,
    P: tl.constexpr,
    BP: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    END: tl.constexpr,
    ATTEND: tl.constexpr,
    FEED: tl.constexpr,
    GROUP: tl.constexpr,
    FC: tl.constexpr,
):
    """Write the gradient of a tile's gathered vectors, and what the weights' gradients are products of.

    A launch computes the blocks from `first` to before `last`, counted from the last block, or their halves FEED or
    ATTEND; the last launch (END) goes on to the gathered vectors. Tiles beyond the true count, and rows that are none,
    have gradients of zero.
    """
    DTYPE: tl.constexpr = operands_ptr.dtype.element_ty
    SUMS: tl.constexpr = (P + 2 + 4 * BLOCKS) * D
    o_c = tl.arange(0, D)
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    p_gradient = o_m[:, None] * D + o_c[None, :]
    if tl.program_id(0) >= tl.load(header_ptr + TILES):
        tl.store(of_inputs_ptr + p_gradient, tl.zeros((BM, D), tl.float32))
        return
    o_r, item, user, position, number, prefix = load_rows(
        header_ptr, inputs_ptr, row_users_ptr, positions_ptr, users_ptr, BM
    )
    is_row = item >= 0
    visible = visible_keys(user, position, GROUP, BM)
    p_normed = normed_ptr + o_m[:, None] * ((1 + 2 * BLOCKS) * D) + o_c[None, :]
    p_rstd = rstd_ptr + o_m
    p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * SUMS
    dx = tl.load(gradient_ptr + p_gradient, mask=is_row[:, None], other=0.0)
    for i in tl.range(first, last, loop_unroll_factor=1):
        b = BLOCKS - 1 - i
        at = (P + 2) * D + b * (12 * D * D + 9 * D)  # of the block's weights
        p_operands, p_weights = operands_ptr + at, weights_ptr + at
        row = tl.cast(b, tl.int64) * M + o_m
        p_factors = factors_ptr + row[:, None] * (16 * D)
        p_block_sums = p_sums + (P + 2 + 4 * b) * D
        if FEED:
            at_norm = 2 + 2 * b
            p_scale = p_weights + 12 * D * D + 7 * D
            dx = _norm_backward(dx, p_scale, p_normed + at_norm * D, p_rstd + at_norm * M, p_block_sums + 2 * D, D)
            df = dx
            if DROP:
                df *= drop_factors(row_hash(prefix, 3 + 3 * b, number, position), o_c[None, :], threshold, scale)
            dx = _feed_backward(df.to(DTYPE), dx, p_operands, p_factors, D, PRECISION, FC)
        if ATTEND:
            at_norm = 1 + 2 * b
            p_scale = p_weights + 4 * D * D
            dx = _norm_backward(dx, p_scale, p_normed + at_norm * D, p_rstd + at_norm * M, p_block_sums, D)
            da = dx
            if DROP:
                da *= drop_factors(row_hash(prefix, 2 + 3 * b, number, position), o_c[None, :], threshold, scale)
            p_attended = attended_ptr + row[:, None] * (3 * D)
            h = row_hash(prefix, 1 + 3 * b, number, position)
            dx = _attention_backward(
                da.to(DTYPE),
                dx,
                p_operands,
                p_factors,
                p_attended,
                visible,
                h,
                position,
                threshold,
                scale,
                P,
                D,
                HEADS,
                BM,
                PRECISION,
                DROP,
                GROUP,
            )
    if END:
        if DROP:
            dx *= drop_factors(row_hash(prefix, 0, number, position), o_c[None, :], threshold, scale)
        dx = _norm_backward(dx, weights_ptr + P * D, p_normed, p_rstd, p_sums + P * D, D)
        o_p = tl.arange(0, BP)
        one_hot = (o_p[:, None] == position[None, :]) & is_row[None, :]
        by_position = tl.dot(one_hot.to(tl.float32), dx, input_precision="tf32x3" if PRECISION != "ieee" else "ieee")
        tl.store(p_sums + o_p[:, None] * D + o_c[None, :], by_position, mask=(o_p < P)[:, None])
    tl.store(of_inputs_ptr + p_gradient, tl.where(is_row[:, None], dx, 0.0))


@triton.jit(do_not_specialize=["M"])
def weight_gradients(
    header_ptr,  # int32 [8]
    factors_ptr,  # [BLOCKS, M, 16 D]: X, dQ dK dV, A, dO, X1, dU [4 D], H [4 D], dF
    sums_ptr,  # fp32 [tiles, (P + 2 + 4 BLOCKS) D]
    parts_ptr,  # fp32 [splits, all weights]
    M,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write one split's part of all weights' gradients, laid out as the weights are.

    The first programs multiply: dQ^T X, dK^T X, dV^T X, dO^T A, dU^T X1, dF^T H, in twelve pieces [D, D] a block, and
    add up dU and dF for the biases. The others add up the tiles' parts of positions and norms, D numbers each.
    """
    PIECES: tl.constexpr = 12 * (D // BN)  # of a block
    BLOCK: tl.constexpr = 12 * D * D + 9 * D
    OUTER: tl.constexpr = (P + 2) * D
    SUMS: tl.constexpr = OUTER + 4 * BLOCKS * D
    i, i_split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tiles = tl.load(header_ptr + TILES)
    p_part = parts_ptr + i_split.to(tl.int64) * (OUTER + BLOCKS * BLOCK)
    o_c = tl.arange(0, D)
    if i < BLOCKS * PIECES:
        b, piece, n = i // PIECES, (i % PIECES) // (D // BN), (i % (D // BN)) * BN
        # columns of the two factors: dQ dK dV and X, dO and A, dU and X1, dF and H
        left = tl.where(piece < 3, 1 + piece, tl.where(piece == 3, 5, tl.where(piece < 8, 3 + piece, 15)))
        right = tl.where(piece < 3, 0, tl.where(piece == 3, 4, tl.where(piece < 8, 6, 3 + piece)))
        o_n = n + tl.arange(0, BN)
        total = tl.zeros((BN, D), tl.float32)
        sums = tl.zeros((BN,), tl.float32)
        steps = tl.cdiv(tl.cdiv(tiles * BM, BK), splits)
        for step in range(i_split * steps, (i_split + 1) * steps):
            o_r = step * BK + tl.arange(0, BK)
            mask = (o_r < tiles * BM)[:, None]
            p_row = factors_ptr + (b.to(tl.int64) * M + o_r)[:, None] * (16 * D)
            g = tl.load(p_row + left * D + o_n[None, :], mask=mask, other=0.0)
            x = tl.load(p_row + right * D + o_c[None, :], mask=mask, other=0.0)
            total = tl.dot(g.T, x, total, input_precision=PRECISION)
            sums += tl.sum(g.to(tl.float32), 0)
        p_block = p_part + OUTER + b * BLOCK
        # four square matrices, norm, feed_in [4 D, D], its bias, feed_out [D, 4 D], its bias, norm
        at = tl.where(piece < 4, piece * D * D, tl.where(piece < 8, piece * D * D + 2 * D, 8 * D * D + 6 * D))
        at += tl.where(piece < 8, 0, (piece - 8) * D)
        stride = tl.where(piece < 8, D, 4 * D)
        tl.store(p_block + at + o_n[:, None] * stride + o_c[None, :], total)
        if (piece >= 4) & (piece < 9):
            at_bias = tl.where(piece < 8, 8 * D * D + (piece - 2) * D, 12 * D * D + 6 * D)
            tl.store(p_block + at_bias + o_n, sums)
    else:
        at = (i - BLOCKS * PIECES) * D
        several = tl.zeros((D,), tl.float32)
        count = tl.cdiv(tiles, splits)
        for first in range(i_split * count, (i_split + 1) * count, BM):
            o_t = first + tl.arange(0, BM)
            mask = o_t < tl.minimum(tiles, (i_split + 1) * count)
            p_sums = sums_ptr + o_t.to(tl.int64)[:, None] * SUMS + at + o_c[None, :]
            several += tl.sum(tl.load(p_sums, mask=mask[:, None], other=0.0), 0)
        norm = (at - OUTER) // D  # of blocks: two vectors of the attention's norm, two of the feed-forward's
        in_block = tl.where(norm % 4 < 2, 4 * D * D, 12 * D * D + 5 * D) + norm % 4 * D
        tl.store(p_part + tl.where(at < OUTER, at, OUTER + norm // 4 * BLOCK + in_block) + o_c, several)
