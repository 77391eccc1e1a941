"""SASRec's backward in Triton: `backward` goes through the rows of a tile, `weight_gradients` sums over all rows.

See sequence_encoder_kernels.py for tiles, stacked heads and the layout of the weights.
"""

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
    """Return the gradient [BM, D] of a layer norm's input; write the tile's part of those of scale and shift."""
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
    dx,  # [BM, D]: the gradient through the residual connection
    p_operands,  # the block's weights
    p_factors,  # [BM, 1]: pointers to the inputs of the block's matrices, of each row
    p_products,  # [BM, 1]: pointers to the gradients of the matrices' outputs, of each row
    D: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    FC: tl.constexpr,
):
    """Return dx plus the gradient through a block's feed-forward; write the gradients of its matrices' outputs."""
    tl.store(p_products + 8 * D + tl.arange(0, D)[None, :], gradient)
    for c in tl.static_range(0, 4 * D, FC):
        o_f = c + tl.arange(0, FC)[None, :]
        hidden = tl.load(p_factors + 3 * D + o_f)
        w = matrix(p_operands + 8 * D * D + 4 * D + 2 * V + c, 4 * D, D, FC)
        of_hidden = tl.dot(gradient, w, input_precision=PRECISION)
        of_hidden = tl.where(hidden > 0, of_hidden, 0.0).to(gradient.dtype)
        tl.store(p_products + 4 * D + o_f, of_hidden)
        w = matrix(p_operands + 4 * D * D + 2 * V + c * D, D, FC, D)
        dx = tl.dot(of_hidden, w, dx, input_precision=PRECISION)
    return dx


@triton.jit
def _attention_backward(
    gradient,  # [BM, D] of the attention's output, in the products' dtype
    dx,  # [BM, D]: the gradient through the residual connection
    p_operands,  # the block's weights
    p_products,  # [BM, 1]: pointers to the gradients of the matrices' outputs, of each row
    p_attended,  # [BM, 1]: pointers to queries, keys and values, of each row
    visible,  # bool [GROUP * BM, BM]
    hashed,  # [BM]: hashes of the rows at the site of the attention weights
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
    """Return dx plus the gradient through a block's attention; write the gradients of its matrices' outputs."""
    DTYPE: tl.constexpr = gradient.dtype
    SERIAL: tl.constexpr = (PRECISION == "ieee") & (gradient.dtype == tl.float32)
    SCALE: tl.constexpr = (D // HEADS) ** -0.5
    o_c = tl.arange(0, D)[None, :]
    tl.store(p_products + 3 * D + o_c, gradient)
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
    tl.store(p_products + o_c, q)
    tl.store(p_products + D + o_c, k)
    tl.store(p_products + 2 * D + o_c, v)
    if SERIAL:
        for i in tl.range(0, 3, loop_unroll_factor=1):
            x = tl.where(i == 0, q, tl.where(i == 1, k, v))
            dx = tl.dot(x, matrix(p_operands + i * D * D, D, D, D), dx, input_precision=PRECISION)
    else:
        dx = tl.dot(q, matrix(p_operands, D, D, D), dx, input_precision=PRECISION)
        dx = tl.dot(k, matrix(p_operands + D * D, D, D, D), dx, input_precision=PRECISION)
        dx = tl.dot(v, matrix(p_operands + 2 * D * D, D, D, D), dx, input_precision=PRECISION)
    return dx


@triton.jit(do_not_specialize=["M", "first", "threshold"])
def backward(
    gradient_ptr,  # fp32 [M, D]: gradient of the states, or the result of the previous launch
    header_ptr,  # int32 [8]
    inputs_ptr,  # int32 [M]
    row_users_ptr,  # int32 [M]
    positions_ptr,  # int32 [M]
    users_ptr,  # int32 [U]
    operands_ptr,  # all weights one after the other, in the products' dtype
    weights_ptr,  # the same in fp32
    normed_ptr,  # fp32 [M, 1 + 2 BLOCKS, D]
    rstd_ptr,  # fp32 [1 + 2 BLOCKS, M]
    factors_ptr,  # [BLOCKS, M, 7 D]: inputs of the matrices: X, A, X1, H [4 D]
    attended_ptr,  # [BLOCKS, M, 3 D]: queries, keys, values
    products_ptr,  # [BLOCKS, M, 9 D]: gradients of the matrices' outputs: dQ, dK, dV, dO, dU [4 D], dF
    of_inputs_ptr,  # fp32 [M, D]
    sums_ptr,  # fp32 [tiles, 2 + 4 BLOCKS, D]: each tile's part of the gradients of the norms
    M,
    first,  # first block, counted from the last one
    threshold,  # of dropout, a uint32 passed as int32
    scale,
    P: tl.constexpr,
    OUTER: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    DROP: tl.constexpr,
    END: tl.constexpr,
    ATTEND: tl.constexpr,
    FEED: tl.constexpr,
    GROUP: tl.constexpr,
    FC: tl.constexpr,
):
    """Write the gradient of the item vectors that a tile's rows read, and the gradients of the matrices' outputs.

    A launch computes COUNT blocks, back from block BLOCKS - 1 - first: both halves, or only FEED or only ATTEND. The
    last launch (END) goes on through the first norm to the item vectors; earlier ones write the gradient of their first
    input. The gradients of padding rows and of tiles beyond the true count are 0.
    """
    DTYPE: tl.constexpr = operands_ptr.dtype.element_ty
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
    p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * (2 + 4 * BLOCKS) * D
    dx = tl.load(gradient_ptr + p_gradient, mask=is_row[:, None], other=0.0)
    for i in tl.range(first, first + COUNT, loop_unroll_factor=1):
        b = BLOCKS - 1 - i
        at = OUTER + b * (12 * D * D + 4 * D + 5 * V)  # of the block's weights
        p_operands, p_weights = operands_ptr + at, weights_ptr + at
        row = tl.cast(b, tl.int64) * M + o_m
        p_factors = factors_ptr + row[:, None] * (7 * D)
        p_products = products_ptr + row[:, None] * (9 * D)
        p_block_sums = p_sums + (2 + 4 * b) * D
        if FEED:
            at_norm = 2 + 2 * b
            p_scale = p_weights + 12 * D * D + 4 * D + 3 * V
            dx = _norm_backward(dx, p_scale, p_normed + at_norm * D, p_rstd + at_norm * M, p_block_sums + 2 * D, D)
            df = dx
            if DROP:
                df *= drop_factors(row_hash(prefix, 3 + 3 * b, number, position), o_c[None, :], threshold, scale)
            dx = _feed_backward(df.to(DTYPE), dx, p_operands, p_factors, p_products, D, V, PRECISION, FC)
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
                p_products,
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
        dx = _norm_backward(dx, weights_ptr + OUTER - 2 * V, p_normed, p_rstd, p_sums, D)
    tl.store(of_inputs_ptr + p_gradient, tl.where(is_row[:, None], dx, 0.0))


@triton.jit(do_not_specialize=["M"])
def weight_gradients(
    header_ptr,  # int32 [8]
    positions_ptr,  # int32 [M]
    of_inputs_ptr,  # fp32 [M, D]
    factors_ptr,  # [BLOCKS, M, 7 D]: X, A, X1, H [4 D]
    products_ptr,  # [BLOCKS, M, 9 D]: dQ, dK, dV, dO, dU [4 D], dF
    sums_ptr,  # fp32 [tiles, 2 + 4 BLOCKS, D]
    parts_ptr,  # fp32 [splits, all weights]
    M,
    P: tl.constexpr,
    BP: tl.constexpr,
    OUTER: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write one split's part of all weights' gradients, laid out like the weights.

    The first programs compute dQ^T X, dK^T X, dV^T X, dO^T A, dU^T X1 and dF^T H, twelve pieces [D, D] for each block,
    and the sums of dU and dF for the biases. One more adds up the rows of each position. The others add up one scale or
    shift of a norm each.
    """
    PIECES: tl.constexpr = 12 * (D // BN)  # of a block
    BLOCK: tl.constexpr = 12 * D * D + 4 * D + 5 * V
    SUM_PRECISION: tl.constexpr = (
        "ieee" if PRECISION == "ieee" and factors_ptr.dtype.element_ty == tl.float32 else "tf32x3"
    )
    i = tl.program_id(0)
    i_split = tl.program_id(1)
    splits = tl.num_programs(1)
    tiles = tl.load(header_ptr + TILES)
    p_part = parts_ptr + i_split.to(tl.int64) * (OUTER + BLOCKS * BLOCK)
    steps = tl.cdiv(tl.cdiv(tiles * BM, BK), splits)
    o_c = tl.arange(0, D)
    if i < BLOCKS * PIECES:
        b, piece, n = i // PIECES, (i % PIECES) // (D // BN), (i % (D // BN)) * BN
        left = tl.minimum(piece, 8)  # column blocks of the outputs' gradients (left) and of the inputs (right)
        right = tl.where(piece < 3, 0, tl.where(piece == 3, 1, tl.where(piece < 8, 2, piece - 5)))
        o_n = n + tl.arange(0, BN)
        total = tl.zeros((BN, D), tl.float32)
        sums = tl.zeros((BN,), tl.float32)
        for step in range(i_split * steps, (i_split + 1) * steps):
            o_r = step * BK + tl.arange(0, BK)
            mask = (o_r < tiles * BM)[:, None]
            row = (b.to(tl.int64) * M + o_r)[:, None]
            g = tl.load(products_ptr + row * (9 * D) + left * D + o_n[None, :], mask=mask, other=0.0)
            x = tl.load(factors_ptr + row * (7 * D) + right * D + o_c[None, :], mask=mask, other=0.0)
            total = tl.dot(g.T, x, total, input_precision=PRECISION)
            sums += tl.sum(g.to(tl.float32), 0)
        p_block = p_part + OUTER + b * BLOCK
        # four square matrices, norm, feed_in [4 D, D], its bias, feed_out [D, 4 D], its bias, norm
        at = tl.where(piece < 8, piece * D * D + tl.where(piece < 4, 0, 2 * V), 8 * D * D + 4 * D + 2 * V)
        at += tl.where(piece < 8, 0, (piece - 8) * D)
        stride = tl.where(piece < 8, D, 4 * D)
        tl.store(p_block + at + o_n[:, None] * stride + o_c[None, :], total)
        if (piece >= 4) & (piece < 9):
            at_bias = 2 * V + tl.where(piece < 8, 8 * D * D + (piece - 4) * D, 12 * D * D + 4 * D)
            tl.store(p_block + at_bias + o_n, sums)
    elif i == BLOCKS * PIECES:
        o_p = tl.arange(0, BP)
        by_position = tl.zeros((BP, D), tl.float32)
        for step in range(i_split * steps, (i_split + 1) * steps):
            o_r = step * BK + tl.arange(0, BK)
            mask = o_r < tiles * BM
            one_hot = o_p[:, None] == tl.load(positions_ptr + o_r, mask=mask, other=-1)[None, :]
            g = tl.load(of_inputs_ptr + o_r.to(tl.int64)[:, None] * D + o_c[None, :], mask=mask[:, None], other=0.0)
            by_position = tl.dot(one_hot.to(tl.float32), g, by_position, input_precision=SUM_PRECISION)
        tl.store(p_part + o_p[:, None] * D + o_c[None, :], by_position, mask=(o_p < P)[:, None])
    else:
        vector = i - BLOCKS * PIECES - 1
        total = tl.zeros((D,), tl.float32)
        count = tl.cdiv(tiles, splits)
        for first in range(i_split * count, (i_split + 1) * count, BM):
            o_t = first + tl.arange(0, BM)
            mask = o_t < tl.minimum(tiles, (i_split + 1) * count)
            p_sums = sums_ptr + (o_t.to(tl.int64) * (2 + 4 * BLOCKS) + vector)[:, None] * D + o_c[None, :]
            total += tl.sum(tl.load(p_sums, mask=mask[:, None], other=0.0), 0)
        of_block = vector - 2  # two vectors of the attention's norm and two of the feed-forward's, a block
        at = tl.where(of_block % 4 < 2, 4 * D * D, 12 * D * D + 4 * D + V) + of_block % 4 * V
        at = OUTER + tl.where(vector < 2, (vector - 2) * V, of_block // 4 * BLOCK + at)
        tl.store(p_part + at + o_c, total)
