"""The Triton kernels of the in-batch cross-entropy. inbatch_cross_entropy.py launches them.

Logarithms are to base 2. A column's logit is s = <q, e> / ln 2 + bias, where bias = log2 m - log2 p. Columns are read
32 at a time, so that one word of history bits is their mask. The columns of the user's history, the target among them,
are masked. The target's logit t is computed by a separate dot product, and Z starts with exp2(t).

TILE_ROWS selects one of two layouts of rows. If it is above 0, rows stand in tiles of TILE_ROWS rows with padding rows,
whose input is -1; a header has the true counts, and the gradient is that of the mean loss. If it is 0, all R rows count
and each loss has its gradient. log2 Z of a padding row is infinite, so that its probabilities are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..types import HEADER

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
DISTINCT = tl.constexpr(HEADER.index("distinct"))
ROWS = tl.constexpr(HEADER.index("rows"))
TILES = tl.constexpr(HEADER.index("tiles"))


@triton.jit
def true_counts(header_ptr, R, V, TILE_ROWS: tl.constexpr):
    """Return (rows, columns) to compute: from the header if TILE_ROWS > 0, else R and V."""
    if TILE_ROWS > 0:
        return tl.load(header_ptr + TILES) * TILE_ROWS, tl.load(header_ptr + DISTINCT)
    else:
        return R, V


@triton.jit
def row_splits(rows, columns, BM: tl.constexpr, BC: tl.constexpr, PROGRAMS: tl.constexpr):
    """Return (tiles of BM rows, blocks of BC columns, splits of the rows for each block)."""
    tiles = tl.cdiv(rows, BM)
    blocks = tl.maximum(tl.cdiv(columns, BC), 1)
    return tiles, blocks, tl.maximum(tl.minimum(tiles, PROGRAMS // blocks), 1)


@triton.jit
def _whole_rows(ptr, o_r, BD: tl.constexpr):
    """Load rows o_r of a matrix of width BD, without a mask."""
    return tl.load(ptr + o_r.to(tl.int64)[:, None] * BD + tl.arange(0, BD)[None, :])


@triton.jit
def _own_columns(word, target, i_tile, is_beyond, MASKED: tl.constexpr):
    """Return bool [BM, 32]: True for the columns of tile i_tile that Z leaves out.

    They are the items whose bit is set in word [BM], the history bits; without MASKED the target [BM] alone. With
    is_beyond, a tile after the last, they are all.
    """
    o_c = tl.arange(0, 32)
    if MASKED:
        return (tl.where(is_beyond, -1, word)[:, None] & (1 << o_c)[None, :]) != 0
    else:
        return ((target - i_tile * 32)[:, None] == o_c[None, :]) | is_beyond


@triton.jit
def _first_words(bits_ptr, row_users_ptr, o_r, MASKED: tl.constexpr):
    """Return pointers to the rows' history bits of the first tile; without MASKED, to a word that is not used."""
    if MASKED:
        return bits_ptr + tl.load(row_users_ptr + o_r)
    else:
        return bits_ptr


@triton.jit
def _next_words(p_word, i_tile, last, bits_stride, MASKED: tl.constexpr):
    """Return pointers to the rows' history bits of the tile after i_tile, or of the last tile."""
    if MASKED:
        return p_word + tl.where(i_tile < last, bits_stride, 0)
    else:
        return p_word


@triton.jit(do_not_specialize=["R", "V", "bits_stride"])
def forward(
    queries_ptr,  # [R, BD]
    items_ptr,  # [V, BD]
    targets_ptr,  # int32 [R]
    inputs_ptr,  # int32 [R]: -1 for padding rows; not read without TILE_ROWS
    row_users_ptr,  # int32 [R]; not read without MASKED, like bits
    bits_ptr,  # int32 [words, users]
    bits_stride,
    bias_ptr,  # [V rounded up to 32]: minus infinity beyond the last column
    log2_p_ptr,  # [V]
    header_ptr,  # int32
    losses_ptr,  # [R]
    log2_z_ptr,  # [R rounded up to ROW_BLOCK], like target_weights
    target_weights_ptr,
    R,
    V,
    TILE_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    SUB: tl.constexpr,
):
    """Write loss, log2 Z and target weight (the target's probability minus 1) of a tile of BM rows."""
    rows, columns = true_counts(header_ptr, R, V, TILE_ROWS)
    i_row = tl.program_id(0) * BM
    o_r = i_row + tl.arange(0, BM)
    if i_row >= rows:
        tl.store(losses_ptr + o_r, tl.zeros((BM,), tl.float32), mask=o_r < R)
        tl.store(log2_z_ptr + o_r, tl.full((BM,), float("inf"), tl.float32))
        tl.store(target_weights_ptr + o_r, tl.zeros((BM,), tl.float32))
        return
    o_q = tl.minimum(o_r, rows - 1)
    last = tl.cdiv(columns, 32) - 1
    q = _whole_rows(queries_ptr, o_q, BD)
    target = tl.load(targets_ptr + o_q)
    log2_p = tl.load(log2_p_ptr + target)
    t = tl.sum(q.to(tl.float32) * _whole_rows(items_ptr, target, BD).to(tl.float32), 1) * LOG2_E - log2_p
    multiplicity = tl.exp2(tl.load(bias_ptr + target) + log2_p)
    is_row = o_r < rows
    if TILE_ROWS > 0:
        is_row &= tl.load(inputs_ptr + o_q) >= 0
    p_word = _first_words(bits_ptr, row_users_ptr, o_q, MASKED)
    word = tl.load(p_word)
    if MASKED:
        own_bits = tl.load(p_word + (target // 32).to(tl.int64) * bits_stride) >> (target % 32)
        starts = tl.where((own_bits & 1) == 1, 1.0, 1.0 - multiplicity)  # without its bit the target is a column too
    else:
        starts = multiplicity
    highest = t
    z = starts
    for i_first in range(0, last + 1, SUB):
        for j in tl.static_range(SUB):
            i_tile = tl.minimum(i_first + j, last)
            o_v = i_tile * 32 + tl.arange(0, 32)
            e = _whole_rows(items_ptr, tl.minimum(o_v, columns - 1), BD)
            bias = tl.load(bias_ptr + o_v)
            is_own = _own_columns(word, target, i_tile, i_first + j > last, MASKED)
            p_word = _next_words(p_word, i_tile, last, bits_stride, MASKED)
            word = tl.load(p_word)
            s = tl.dot(q, e.T, input_precision=PRECISION) * LOG2_E + bias[None, :]
            s = tl.where(is_own, float("-inf"), s)
            higher = tl.maximum(highest, tl.max(s, 1))
            z = z * tl.exp2(highest - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            highest = higher
    log2_z = highest + tl.log2(z)
    tl.store(losses_ptr + o_r, tl.where(is_row, (log2_z - t) * LN_2, 0.0), mask=o_r < R)
    tl.store(log2_z_ptr + o_r, tl.where(is_row, log2_z, float("inf")))
    tl.store(target_weights_ptr + o_r, tl.where(is_row, tl.exp2(t - log2_z) * starts - 1, 0.0))


@triton.jit(do_not_specialize=["R", "V", "bits_stride"])
def query_gradients(
    queries_ptr,  # [R, BD]
    items_ptr,  # [V, BD]
    targets_ptr,  # int32 [R]
    row_users_ptr,  # int32 [R]; not read without MASKED, as the next
    bits_ptr,  # int32 [words, users]
    bits_stride,
    bias_ptr,  # [V rounded up to 32]
    header_ptr,  # int32
    log2_z_ptr,  # [R rounded up], as the next
    target_weights_ptr,
    gradient_ptr,  # [R]; not read with TILE_ROWS
    query_gradients_ptr,  # [R, BD]
    R,
    V,
    TILE_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    SUB: tl.constexpr,
):
    """Write the gradient of BM queries: the sum of (probability - is_target) e, times the loss's gradient."""
    rows, columns = true_counts(header_ptr, R, V, TILE_ROWS)
    i_row = tl.program_id(0) * BM
    if i_row >= rows:
        return
    o_r = i_row + tl.arange(0, BM)
    o_q = tl.minimum(o_r, rows - 1)
    last = tl.cdiv(columns, 32) - 1
    q = _whole_rows(queries_ptr, o_q, BD)
    target = tl.load(targets_ptr + o_q)
    log2_z = tl.load(log2_z_ptr + o_q)
    p_word = _first_words(bits_ptr, row_users_ptr, o_q, MASKED)
    word = tl.load(p_word)
    total = tl.zeros((BM, BD), tl.float32)
    for i_first in range(0, last + 1, SUB):
        for j in tl.static_range(SUB):
            i_tile = tl.minimum(i_first + j, last)
            o_v = i_tile * 32 + tl.arange(0, 32)
            e = _whole_rows(items_ptr, tl.minimum(o_v, columns - 1), BD)
            bias = tl.load(bias_ptr + o_v)
            is_own = _own_columns(word, target, i_tile, i_first + j > last, MASKED)
            p_word = _next_words(p_word, i_tile, last, bits_stride, MASKED)
            word = tl.load(p_word)
            s = tl.dot(q, e.T, input_precision=PRECISION) * LOG2_E + bias[None, :] - log2_z[:, None]
            weight = tl.exp2(tl.where(is_own, float("-inf"), s))
            total = tl.dot(weight.to(e.dtype), e, total, input_precision=PRECISION)
    total += tl.load(target_weights_ptr + o_q)[:, None] * _whole_rows(items_ptr, target, BD).to(tl.float32)
    if TILE_ROWS > 0:
        total *= 1.0 / tl.load(header_ptr + ROWS).to(tl.float32)
    else:
        total *= tl.load(gradient_ptr + o_q)[:, None]
    p_out = query_gradients_ptr + o_r.to(tl.int64)[:, None] * BD + tl.arange(0, BD)[None, :]
    tl.store(p_out, total, mask=(o_r < rows)[:, None])


@triton.jit(do_not_specialize=["R", "V", "bits_stride"])
def item_gradients(
    queries_ptr,  # [R, BD]
    items_ptr,  # [V, BD]
    targets_ptr,  # int32 [R]; not read with TILE_ROWS
    row_users_ptr,  # int32 [R]; not read without MASKED, as the next
    bits_ptr,  # int32 [words, users]
    bits_stride,
    bias_ptr,  # [V rounded up to 32]
    header_ptr,  # int32
    log2_z_ptr,  # [R rounded up], as the next
    target_weights_ptr,
    gradient_ptr,  # [R]; not read with TILE_ROWS
    parts_ptr,  # [programs, SUB * BN, BD]
    R,
    V,
    TILE_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SUB: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Write a part of the items' gradient: for SUB * BN columns, a sum over one split of the rows.

    The sum is of (probability - is_target) q, times the gradient of the row's loss. With TILE_ROWS it leaves out the
    is_target term and the factor of the mean, which `item_vector_gradients` adds.
    """
    WORDS: tl.constexpr = BN // 32
    rows, columns = true_counts(header_ptr, R, V, TILE_ROWS)
    tiles, blocks, splits = row_splits(rows, columns, BM, SUB * BN, PROGRAMS)
    i_program = tl.program_id(0)
    if (i_program >= blocks * splits) | (columns == 0):  # an empty batch has no columns to read
        return
    i_split = i_program // blocks
    i_column = (i_program % blocks) * (SUB * BN)
    last = tl.cdiv(columns, 32) - 1
    bit = (1 << tl.arange(0, 32))[None, :, None]
    es = ()
    biases = ()
    totals = ()
    for j in tl.static_range(SUB):
        o_v = tl.minimum(i_column + j * BN + tl.arange(0, BN), columns - 1)
        es = es + (_whole_rows(items_ptr, o_v, BD),)
        biases = biases + (tl.load(bias_ptr + o_v),)
        totals = totals + (tl.zeros((BN, BD), tl.float32),)
    for i_tile in range(i_split * tiles // splits, (i_split + 1) * tiles // splits):
        o_r = i_tile * BM + tl.arange(0, BM)
        o_q = tl.minimum(o_r, rows - 1)
        q = _whole_rows(queries_ptr, o_q, BD)
        log2_z = tl.load(log2_z_ptr + o_r)
        if MASKED:
            user = tl.load(row_users_ptr + o_q)
        if TILE_ROWS == 0:
            target = tl.load(targets_ptr + o_q) - i_column
            target_weight = tl.load(target_weights_ptr + o_r)
            gradient = tl.load(gradient_ptr + o_q)
        sums = ()
        for j in tl.static_range(SUB):
            s = tl.dot(es[j], q.T, input_precision=PRECISION) * LOG2_E + biases[j][:, None] - log2_z[None, :]
            if MASKED:
                o_w = tl.minimum(i_column // 32 + j * WORDS + tl.arange(0, WORDS), last).to(tl.int64)
                word = tl.load(bits_ptr + (o_w * bits_stride)[:, None] + user[None, :])
                is_own = (word[:, None, :] & bit) != 0
                s = tl.reshape(tl.where(is_own, float("-inf"), tl.reshape(s, (WORDS, 32, BM))), (BN, BM))
            weight = tl.exp2(s)
            if TILE_ROWS == 0:
                is_target = (j * BN + tl.arange(0, BN))[:, None] == target[None, :]
                rest = weight if MASKED else 0.0
                weight = tl.where(is_target, rest + target_weight[None, :], weight) * gradient[None, :]
            sums = sums + (tl.dot(weight.to(q.dtype), q, totals[j], input_precision=PRECISION),)
        totals = sums
    p_parts = parts_ptr + i_program.to(tl.int64) * (SUB * BN * BD)
    for j in tl.static_range(SUB):
        o_v = j * BN + tl.arange(0, BN)
        tl.store(p_parts + o_v[:, None] * BD + tl.arange(0, BD)[None, :], totals[j])


@triton.jit(do_not_specialize=["V"])
def item_vector_gradients(
    parts_ptr,  # [programs, BC, BD]: written by `item_gradients`, whose programs have BC columns
    target_weights_ptr,  # [R]
    queries_ptr,  # [R, BD]
    of_inputs_ptr,  # fp32 [R, BD]: gradients of the rows' input vectors
    offsets_ptr,  # int32 [V + 1]
    occurrences_ptr,  # int32
    header_ptr,  # int32
    of_vectors_ptr,  # fp32 [V, BD]
    V,
    TILE_ROWS: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the whole gradient of BV item vectors: the sum of the parts, plus a gradient for each occurrence.

    An occurrence of an item as input has the gradient in of_inputs; as target, target_weight times the query. They are
    sorted by item, so those of a tile of items are one range. A one-hot matrix [BV, BK] assigns them to items.
    """
    rows, columns = true_counts(header_ptr, V, V, TILE_ROWS)
    tiles, blocks, splits = row_splits(rows, columns, BM, BC, PROGRAMS)
    mean = 1.0 / tl.load(header_ptr + ROWS).to(tl.float32)
    i_column = tl.program_id(0) * BV
    o_v = i_column + tl.arange(0, BV)
    o_d = tl.arange(0, BD)
    p_out = of_vectors_ptr + o_v.to(tl.int64)[:, None] * BD + o_d[None, :]
    total = tl.zeros((BV, BD), tl.float32)
    if i_column >= columns:
        tl.store(p_out, total, mask=(o_v < V)[:, None])
        return
    p_parts = parts_ptr + ((i_column // BC) * BC + o_v % BC)[:, None] * BD + o_d[None, :]
    for i_split in range(0, splits):
        total += tl.load(p_parts + tl.cast(i_split * blocks, tl.int64) * (BC * BD))
    total *= mean
    starts = tl.load(offsets_ptr + tl.minimum(o_v, columns))
    ends = tl.load(offsets_ptr + tl.minimum(o_v + 1, columns))
    first = tl.load(offsets_ptr + i_column)
    end = tl.load(offsets_ptr + tl.minimum(i_column + BV, columns))
    for i_k in range(first, end, BK):
        o_k = i_k + tl.arange(0, BK)
        code = tl.load(occurrences_ptr + o_k, mask=o_k < end, other=0)
        row = (code >> 2).to(tl.int64)
        is_input = (code & 1) != 0
        is_target = (code & 2) != 0
        weight = tl.load(target_weights_ptr + row - 1, mask=is_target, other=0.0) * mean
        p_input = of_inputs_ptr + row[:, None] * BD + o_d[None, :]
        p_query = queries_ptr + (row - 1)[:, None] * BD + o_d[None, :]
        query = tl.load(p_query, mask=is_target[:, None], other=0.0).to(tl.float32)
        gradient = tl.load(p_input, mask=is_input[:, None], other=0.0) + weight[:, None] * query
        is_of = (starts[:, None] <= o_k[None, :]) & (o_k[None, :] < ends[:, None])
        total = tl.dot(is_of.to(tl.float32), gradient, total, input_precision="ieee")
    tl.store(p_out, tl.where((o_v < columns)[:, None], total, 0.0), mask=(o_v < V)[:, None])
