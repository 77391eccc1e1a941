"""SASRec's forward in Triton: a program computes a tile of packed rows, from item vectors to hidden states.

A tile holds the rows of several users, each user's in order. A row attends to the rows of its user up to itself. To
compute GROUP heads by one product, the queries are stacked: GROUP copies along the rows, each 0 outside the columns of
its head.

All weights lie in one buffer in the order of `SequenceWeights`: positions and first norm take OUTER numbers, then come
the blocks. A vector [D] takes V numbers, its alignment included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..types import HEADER

LOG2_E = tl.constexpr(1.4426950408889634)
TILES, PREFIX = tl.constexpr(HEADER.index("tiles")), tl.constexpr(HEADER.index("prefix"))


@triton.jit
def _mix(h):
    """Mix the bits of a uint32; `_mix` and `_absorb` are those of reference/dropout.py."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _absorb(h, field):
    """Return the hash of a hash h and one more number."""
    return _mix(h ^ (field.to(tl.uint32) * 0x9E3779B1))


@triton.jit
def row_hash(prefix, site, user, position):
    """Return the hash [BM] of (prefix, site, user, position); site is a number or a tensor of one."""
    return _absorb(_absorb(_absorb(prefix, tl.full((1,), 0, tl.uint32) + site), user), position)


@triton.jit
def drop_factors(row, channel, threshold, scale):
    """Return dropout factors [N, C], 0 or `scale`, from row hashes [N] and channels [N or 1, C]."""
    h = _absorb(row[:, None], channel)
    return tl.where(h >= threshold.to(tl.uint32), scale, 0.0)


@triton.jit
def weight_factors(row, position, head, threshold, scale, P: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr):
    """Return dropout factors [GROUP * BM, BM] of the attention weights of GROUP heads, the first of them `head`."""
    rows = tl.reshape(tl.broadcast_to(row[None, :], (GROUP, BM)), (GROUP * BM,))
    heads = head + tl.arange(0, GROUP * BM) // BM
    return drop_factors(rows, heads[:, None] * P + position[None, :], threshold, scale)


@triton.jit
def load_rows(header_ptr, inputs_ptr, row_users_ptr, positions_ptr, users_ptr, BM: tl.constexpr):
    """Return a tile's (row numbers, inputs, users in the batch, positions, user numbers), and the hash's prefix."""
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    item = tl.load(inputs_ptr + o_r)
    user = tl.load(row_users_ptr + o_r)
    position = tl.load(positions_ptr + o_r)
    number = tl.load(users_ptr + user, mask=item >= 0, other=0)
    prefix = tl.load(header_ptr + PREFIX).to(tl.uint32)
    return o_r, item, user, position, number, prefix


@triton.jit
def visible_keys(user, position, GROUP: tl.constexpr, BM: tl.constexpr):
    """Return bool [GROUP * BM, BM]: True if the key's row has the query's user and is not later."""
    visible = (user[:, None] == user[None, :]) & (position[None, :] <= position[:, None])
    return tl.reshape(tl.broadcast_to(visible[None, :, :], (GROUP, BM, BM)), (GROUP * BM, BM))


@triton.jit
def head_columns(head, D: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Return bool [GROUP, 1, D]: True if the column belongs to head `head` + i."""
    return (tl.arange(0, D) // (D // HEADS))[None, None, :] == head + tl.arange(0, GROUP)[:, None, None]


@triton.jit
def stack_heads(x, columns, GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr):
    """Return [GROUP * BM, D]: a copy of x [BM, D] for each head, 0 outside the head's columns."""
    return tl.reshape(tl.where(columns, x[None, :, :], tl.zeros((1, 1, 1), x.dtype)), (GROUP * BM, D))


@triton.jit
def unstack_heads(x, columns, GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr):
    """Return [BM, D]: the columns of each head from its copy in x [GROUP * BM, D], 0 in columns of other heads."""
    return tl.sum(tl.where(columns, tl.reshape(x, (GROUP, BM, D)), 0.0), 0)


@triton.jit
def attention_weights(q, k, visible, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the attention weights [GROUP * BM, BM] of stacked queries q, the softmax of SCALE q k^T where visible."""
    scores = tl.dot(q, k.T, input_precision=PRECISION) * (SCALE * LOG2_E)
    scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def matrix(ptr, stride: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Load the matrix [N, K] at a pointer."""
    return tl.load(ptr + tl.arange(0, N)[:, None] * stride + tl.arange(0, K)[None, :])


@triton.jit
def _layer_norm(
    x, p_scale, p_normed, p_rstd, EPSILON: tl.constexpr, D: tl.constexpr, V: tl.constexpr, STORE: tl.constexpr
):
    """Return the layer norm of x [BM, D].

    p_scale: pointer to the norm's scale [D]; its shift lies V numbers after it. With STORE, write the normalised rows
    to the block of pointers p_normed [BM, D], and 1 / standard deviation to p_rstd [BM].
    """
    o_c = tl.arange(0, D)
    centred = x - (tl.sum(x, 1) * (1.0 / D))[:, None]
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) * (1.0 / D) + EPSILON)
    normed = centred * rstd[:, None]
    if STORE:
        tl.store(p_normed, normed)
        tl.store(p_rstd, rstd)
    return normed * tl.load(p_scale + o_c)[None, :] + tl.load(p_scale + V + o_c)[None, :]


@triton.jit
def _attention(
    x,  # [BM, D] in the products' dtype
    p_operands,  # the block's weights
    p_factors,  # [BM, 1]: pointers to the inputs of the block's matrices, of each row
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
    STORE: tl.constexpr,
    DROP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the output [BM, D] of a block's attention, projection included; STORE: write what backward reads."""
    o_c = tl.arange(0, D)[None, :]
    q = tl.dot(x, matrix(p_operands, D, D, D).T, input_precision=PRECISION).to(x.dtype)
    k = tl.dot(x, matrix(p_operands + D * D, D, D, D).T, input_precision=PRECISION).to(x.dtype)
    v = tl.dot(x, matrix(p_operands + 2 * D * D, D, D, D).T, input_precision=PRECISION).to(x.dtype)
    if STORE:
        tl.store(p_factors + o_c, x)
        tl.store(p_attended + o_c, q)
        tl.store(p_attended + D + o_c, k)
        tl.store(p_attended + 2 * D + o_c, v)
    a = tl.zeros((BM, D), tl.float32)
    for head in tl.static_range(0, HEADS, GROUP):
        columns = head_columns(head, D, HEADS, GROUP)
        p = attention_weights(stack_heads(q, columns, GROUP, BM, D), k, visible, (D // HEADS) ** -0.5, PRECISION)
        if DROP:
            p *= weight_factors(hashed, position, head, threshold, scale, P, GROUP, BM)
        a += unstack_heads(tl.dot(p.to(x.dtype), v, input_precision=PRECISION), columns, GROUP, BM, D)
    a = a.to(x.dtype)
    if STORE:
        tl.store(p_factors + D + o_c, a)
    return tl.dot(a, matrix(p_operands + 3 * D * D, D, D, D).T, input_precision=PRECISION)


@triton.jit
def _feed_forward(
    x,  # [BM, D] in the products' dtype
    p_operands,  # the block's weights in the products' dtype
    p_weights,  # the block's weights in fp32
    p_factors,  # [BM, 1]: pointers to the inputs of the block's matrices, of each row
    D: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE: tl.constexpr,
    FC: tl.constexpr,
):
    """Return the output [BM, D] of a block's feed-forward, computed in chunks of FC hidden units."""
    o_c = tl.arange(0, D)[None, :]
    if STORE:
        tl.store(p_factors + 2 * D + o_c, x)
    out = tl.zeros(x.shape, tl.float32) + tl.load(p_weights + 12 * D * D + 4 * D + 2 * V + o_c)
    for c in tl.static_range(0, 4 * D, FC):
        o_f = c + tl.arange(0, FC)
        w = matrix(p_operands + 4 * D * D + 2 * V + c * D, D, FC, D)
        hidden = tl.dot(x, w.T, input_precision=PRECISION)
        hidden += tl.load(p_weights + 8 * D * D + 2 * V + o_f)[None, :]
        hidden = tl.maximum(hidden, 0.0).to(x.dtype)
        w = matrix(p_operands + 8 * D * D + 4 * D + 2 * V + c, 4 * D, D, FC)
        out = tl.dot(hidden, w.T, out, input_precision=PRECISION)
        if STORE:
            tl.store(p_factors + 3 * D + o_f[None, :], hidden)
    return out


@triton.jit(do_not_specialize=["M", "first", "threshold"])
def forward(
    vectors_ptr,  # fp32 [V, D]
    header_ptr,  # int32 [8]
    inputs_ptr,  # int32 [M]
    row_users_ptr,  # int32 [M]
    positions_ptr,  # int32 [M]
    users_ptr,  # int32 [U]
    operands_ptr,  # all weights one after the other, in the products' dtype
    weights_ptr,  # the same in fp32
    states_ptr,  # fp32 [M, D]
    state_operands_ptr,  # [M, D], or states
    normed_ptr,  # fp32 [M, 1 + 2 BLOCKS, D]
    rstd_ptr,  # fp32 [1 + 2 BLOCKS, M]
    factors_ptr,  # [BLOCKS, M, 7 D]: inputs of the matrices: block's, attended values, feed-forward's, hidden [4 D]
    attended_ptr,  # [BLOCKS, M, 3 D]: queries, keys, values
    M,
    first,  # number of the first block
    threshold,  # of dropout, a uint32 passed as int32
    scale,
    EPSILON: tl.constexpr,
    P: tl.constexpr,
    OUTER: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE: tl.constexpr,
    DROP: tl.constexpr,
    CAST: tl.constexpr,
    START: tl.constexpr,
    ATTEND: tl.constexpr,
    FEED: tl.constexpr,
    GROUP: tl.constexpr,
    FC: tl.constexpr,
):
    """Write the hidden states of a tile's rows; with STORE also what the backward reads.

    A launch computes COUNT blocks from `first` on: both halves, or only attention (ATTEND) or only the feed-forward
    (FEED). The first launch (START) gathers item vectors; later ones read the states of the launch before. The states
    of padding rows and of tiles beyond the true count are 0. With CAST the states are also written in the products'
    dtype.
    """
    DTYPE: tl.constexpr = operands_ptr.dtype.element_ty
    o_c = tl.arange(0, D)
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    p_state = o_m[:, None] * D + o_c[None, :]
    if tl.program_id(0) >= tl.load(header_ptr + TILES):
        tl.store(states_ptr + p_state, tl.zeros((BM, D), tl.float32))
        if CAST:
            tl.store(state_operands_ptr + p_state, tl.zeros((BM, D), DTYPE))
        return
    o_r, item, user, position, number, prefix = load_rows(
        header_ptr, inputs_ptr, row_users_ptr, positions_ptr, users_ptr, BM
    )
    is_row = item >= 0
    p_normed = normed_ptr + o_m[:, None] * ((1 + 2 * BLOCKS) * D) + o_c[None, :]
    p_rstd = rstd_ptr + o_m
    if START:
        p_vector = vectors_ptr + item.to(tl.int64)[:, None] * D + o_c[None, :]
        x = tl.load(p_vector, mask=is_row[:, None], other=0.0).to(tl.float32)
        x += tl.load(weights_ptr + position[:, None] * D + o_c[None, :])
        x = _layer_norm(x, weights_ptr + OUTER - 2 * V, p_normed, p_rstd, EPSILON, D, V, STORE)
        if DROP:
            x *= drop_factors(row_hash(prefix, 0, number, position), o_c[None, :], threshold, scale)
    else:
        x = tl.load(states_ptr + p_state)
    visible = visible_keys(user, position, GROUP, BM)
    for b in tl.range(first, first + COUNT, loop_unroll_factor=1):
        at = OUTER + b * (12 * D * D + 4 * D + 5 * V)  # of the block's weights
        p_operands, p_weights = operands_ptr + at, weights_ptr + at
        row = tl.cast(b, tl.int64) * M + o_m
        p_factors = factors_ptr + row[:, None] * (7 * D)
        if ATTEND:
            p_attended = attended_ptr + row[:, None] * (3 * D)
            h = row_hash(prefix, 1 + 3 * b, number, position)
            a = _attention(
                x.to(DTYPE),
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
                STORE,
                DROP,
                GROUP,
            )
            if DROP:
                a *= drop_factors(row_hash(prefix, 2 + 3 * b, number, position), o_c[None, :], threshold, scale)
            at_norm = 1 + 2 * b
            p_scale = p_weights + 4 * D * D
            x = _layer_norm(x + a, p_scale, p_normed + at_norm * D, p_rstd + at_norm * M, EPSILON, D, V, STORE)
        if FEED:
            f = _feed_forward(x.to(DTYPE), p_operands, p_weights, p_factors, D, V, PRECISION, STORE, FC)
            if DROP:
                f *= drop_factors(row_hash(prefix, 3 + 3 * b, number, position), o_c[None, :], threshold, scale)
            at_norm = 2 + 2 * b
            p_scale = p_weights + 12 * D * D + 4 * D + 3 * V
            x = _layer_norm(x + f, p_scale, p_normed + at_norm * D, p_rstd + at_norm * M, EPSILON, D, V, STORE)
    x = tl.where(is_row[:, None], x, 0.0)
    tl.store(states_ptr + p_state, x)
    if CAST:
        tl.store(state_operands_ptr + p_state, x.to(DTYPE))
