"""The Triton kernels of the in-batch cross-entropy; inbatch_cross_entropy.py launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(ptr, stride, o_r, o_d, R, D):
    """A tile of rows, zero outside."""
    return tl.load(
        ptr + o_r.to(tl.int64)[:, None] * stride + o_d[None, :], mask=(o_r < R)[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit
def _logits(
    b_q,  # [BM, BD]
    b_e,  # [BN, BD]
    target,  # [BM]
    user,  # [BM]
    o_r,
    o_v,
    R,
    V,
    bits_ptr,
    bits_stride,
    log_m_ptr,
    log_p_ptr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    DEBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(logits [BM, BN], is_target [BM, BN]): <q, e> - log p + log m, minus infinity for the user's own other items.

    The target, which is the user's own too, counts once: without log m.
    """
    m_v = o_v < V
    logits = tl.dot(b_q, b_e.T, input_precision=PRECISION)
    is_target = target[:, None] == o_v[None, :]
    if DEBIASED:
        logits -= tl.load(log_p_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    if COUNTED:
        log_m = tl.load(log_m_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        p_bits = bits_ptr + user.to(tl.int64)[:, None] * bits_stride + (o_v // 32)[None, :]
        words = tl.load(p_bits, mask=(o_r < R)[:, None] & m_v[None, :], other=0)
        is_own = ((words >> (o_v % 32)[None, :]) & 1) == 1
        if COUNTED:
            logits += tl.where(is_own | is_target, 0.0, log_m)
        logits = tl.where(is_own & (is_target == 0), float("-inf"), logits)
    elif COUNTED:
        logits += log_m
    return tl.where(m_v[None, :], logits, float("-inf")), is_target


@triton.jit
def _users(row_users_ptr, o_r, R, MASKED: tl.constexpr):
    """Each row's user where there is a mask to look up."""
    if MASKED:
        return tl.load(row_users_ptr + o_r, mask=o_r < R, other=0)
    else:
        return o_r


@triton.jit(do_not_specialize=["R", "V", "bits_stride"])
def forward(
    queries_ptr,  # [R, D]
    queries_stride,
    items_ptr,  # [V, D]
    items_stride,
    targets_ptr,  # [R]
    row_users_ptr,  # [R]
    bits_ptr,  # [B, words]
    bits_stride,
    log_m_ptr,  # [V]
    log_p_ptr,  # [V]
    losses_ptr,  # [R]
    log_z_ptr,  # [R]
    R,
    V,
    D,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    DEBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Loss and log Z of a tile of rows."""
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    b_q = _rows(queries_ptr, queries_stride, o_r, o_d, R, D)
    target = tl.load(targets_ptr + o_r, mask=o_r < R, other=-1)
    user = _users(row_users_ptr, o_r, R, MASKED)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    z = tl.zeros((BM,), tl.float32)
    t = tl.zeros((BM,), tl.float32)
    for i_v in range(0, V, BN):
        o_v = i_v + tl.arange(0, BN)
        b_e = _rows(items_ptr, items_stride, o_v, o_d, V, D)
        logits, is_target = _logits(
            b_q,
            b_e,
            target,
            user,
            o_r,
            o_v,
            R,
            V,
            bits_ptr,
            bits_stride,
            log_m_ptr,
            log_p_ptr,
            MASKED,
            COUNTED,
            DEBIASED,
            PRECISION,
        )
        t += tl.sum(tl.where(is_target, logits, 0.0), 1)
        higher = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(
            higher == float("-inf"), 0.0, higher
        )  # a tile may be masked as a whole: -inf - -inf is no number
        z = z * tl.exp(highest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        highest = higher
    log_z = highest + tl.log(z)
    if COUNTED and not MASKED:
        t -= tl.load(log_m_ptr + target, mask=o_r < R, other=0.0).to(tl.float32)
    tl.store(losses_ptr + o_r, log_z - t, mask=o_r < R)
    tl.store(log_z_ptr + o_r, log_z, mask=o_r < R)


@triton.jit(do_not_specialize=["R", "V", "bits_stride"])
def query_gradients(
    queries_ptr,  # [R, D]
    queries_stride,
    items_ptr,  # [V, D]
    items_stride,
    targets_ptr,  # [R]
    row_users_ptr,  # [R]
    bits_ptr,  # [B, words]
    bits_stride,
    log_m_ptr,  # [V]
    log_p_ptr,  # [V]
    log_z_ptr,  # [R]
    gradient_ptr,  # [R], any stride
    gradient_stride,
    query_gradients_ptr,  # [R, D]
    R,
    V,
    D,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    DEBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum over the columns of (probability - is_target) e, times the row's gradient."""
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_r = o_r < R
    b_q = _rows(queries_ptr, queries_stride, o_r, o_d, R, D)
    target = tl.load(targets_ptr + o_r, mask=m_r, other=-1)
    user = _users(row_users_ptr, o_r, R, MASKED)
    log_z = tl.load(log_z_ptr + o_r, mask=m_r, other=0.0)
    total = tl.zeros((BM, BD), tl.float32)
    for i_v in range(0, V, BN):
        o_v = i_v + tl.arange(0, BN)
        b_e = _rows(items_ptr, items_stride, o_v, o_d, V, D)
        logits, is_target = _logits(
            b_q,
            b_e,
            target,
            user,
            o_r,
            o_v,
            R,
            V,
            bits_ptr,
            bits_stride,
            log_m_ptr,
            log_p_ptr,
            MASKED,
            COUNTED,
            DEBIASED,
            PRECISION,
        )
        weight = tl.exp(logits - log_z[:, None]) - tl.where(is_target, 1.0, 0.0)
        total = tl.dot(weight.to(b_e.dtype), b_e, total, input_precision=PRECISION)
    total *= tl.load(gradient_ptr + o_r.to(tl.int64) * gradient_stride, mask=m_r, other=0.0).to(tl.float32)[:, None]
    p_out = query_gradients_ptr + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, total, mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["R", "V", "bits_stride", "tiles"])
def item_gradients(
    queries_ptr,  # [R, D]
    queries_stride,
    items_ptr,  # [V, D]
    items_stride,
    targets_ptr,  # [R]
    row_users_ptr,  # [R]
    bits_ptr,  # [B, words]
    bits_stride,
    log_m_ptr,  # [V]
    log_p_ptr,  # [V]
    log_z_ptr,  # [R]
    gradient_ptr,  # [R], any stride
    gradient_stride,
    parts_ptr,  # [S, V, D]
    R,
    V,
    D,
    tiles,  # of each split
    BD: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    DEBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum over one split of the rows of (probability - is_target) q, times each row's gradient."""
    o_v = tl.program_id(0) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    i_split = tl.program_id(1)
    b_e = _rows(items_ptr, items_stride, o_v, o_d, V, D)
    total = tl.zeros((BN, BD), tl.float32)
    for i_tile in range(i_split * tiles, (i_split + 1) * tiles):
        o_r = i_tile * BM + tl.arange(0, BM)
        m_r = o_r < R
        b_q = _rows(queries_ptr, queries_stride, o_r, o_d, R, D)
        target = tl.load(targets_ptr + o_r, mask=m_r, other=-1)
        user = _users(row_users_ptr, o_r, R, MASKED)
        logits, is_target = _logits(
            b_q,
            b_e,
            target,
            user,
            o_r,
            o_v,
            R,
            V,
            bits_ptr,
            bits_stride,
            log_m_ptr,
            log_p_ptr,
            MASKED,
            COUNTED,
            DEBIASED,
            PRECISION,
        )
        log_z = tl.load(log_z_ptr + o_r, mask=m_r, other=float("inf"))  # beyond the last row every probability is 0
        scale = tl.load(gradient_ptr + o_r.to(tl.int64) * gradient_stride, mask=m_r, other=0.0).to(tl.float32)
        weight = (tl.exp(logits - log_z[:, None]) - tl.where(is_target, 1.0, 0.0)) * scale[:, None]
        total = tl.dot(weight.to(b_q.dtype).T, b_q, total, input_precision=PRECISION)
    p_out = parts_ptr + (i_split.to(tl.int64) * V + o_v)[:, None] * D + o_d[None, :]
    tl.store(p_out, total, mask=(o_v < V)[:, None] & (o_d < D)[None, :])
