"""The best items of users in Triton: each program keeps the best of one slice of the catalogue; no scores are stored.

Scores and rows are int64 keys (`score_keys.py`), which PyTorch merges over the slices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..score_keys import NO_ITEM, best_of_keys
from ..types import AddedScores
from .launch import block, launch
from .score_tiles import load_rows, tile_scores, tile_sizes

NOTHING = tl.constexpr(NO_ITEM)
MOST = 128  # best items that fit in the registers of a program


def refusal(count: int) -> str:
    """Return why this form does not return `count` items, or ""."""
    return "" if count <= MOST else f"it needs a count of at most {MOST}, found {count}"


def top_items(
    queries: Tensor,
    items: Tensor,
    count: int,
    excluded: Tensor,
    allowed: Tensor | None = None,
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the reference's rows int64 [U, K] and scores [U, K]; the caller has checked the arguments.

    Scores are fp32 in every dtype, and so is the sum of a score and what is added to it. The best items are chosen by
    them, and they are rounded to the dtype of the queries at the end.
    """
    queries, items = (x if x.stride(1) == 1 else x.contiguous() for x in (queries, items))
    best_count = min(count, len(items))
    offsets, added_items, values = (None,) * 3 if added is None else (part.contiguous() for part in added)
    keys, broken = _best_keys(queries, items, best_count, excluded, allowed, offsets, added_items, values)
    return best_of_keys(keys, broken, count, queries.dtype)


@torch.library.custom_op("iisan_fast::best_item_keys", mutates_args=())
def _best_keys(
    queries: Tensor,
    items: Tensor,
    count: int,
    excluded: Tensor,
    allowed: Tensor | None,
    offsets: Tensor | None,
    added_items: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the keys of the best items, int64 [U, count], falling, and bool [U]: a score is not finite."""
    users, catalogue = len(queries), len(items)
    chosen, blocks = tile_sizes("top_items", queries)
    user_tiles, tiles = triton.cdiv(users, blocks["BM"]), triton.cdiv(catalogue, blocks["BN"])
    splits = max(1, min(tiles, chosen.blocks["PROGRAMS"] // max(1, user_tiles)))
    tiles_of_split = triton.cdiv(tiles, splits)
    best = block(count, most=MOST)
    parts = torch.empty((users, splits, best), dtype=torch.int64, device=queries.device)
    broken = torch.empty((splits, users), dtype=torch.int32, device=queries.device)
    firsts = torch.arange(splits, device=queries.device) * (tiles_of_split * blocks["BN"])
    excluded = excluded.sort(dim=1).values
    excluded_starts = torch.searchsorted(excluded, firsts.expand(users, -1).contiguous())
    if offsets is None or added_items is None or values is None:
        entries = [excluded_starts] * 4  # not read
    else:
        entries = [_entry_starts(offsets, added_items, firsts, catalogue), offsets, added_items, values]
    launch(
        _keep_best,
        "top_items",
        (user_tiles, splits),
        chosen,
        queries,
        queries.stride(0),
        items,
        items.stride(0),
        excluded,
        excluded_starts,
        excluded_starts if allowed is None else allowed.contiguous().view(torch.uint8),
        *entries,
        parts,
        broken,
        users,
        catalogue,
        queries.shape[1],
        excluded.shape[1],
        splits,
        tiles_of_split,
        ADDED=offsets is not None,
        ALLOWED=allowed is not None,
        BEST=best,
        **blocks,
    )
    return parts.view(users, splits * best).topk(count, dim=1).values, broken.sum(0) > 0


@_best_keys.register_fake
def _(queries, items, count, excluded, allowed, offsets, added_items, values):
    """Return empty tensors with the shapes and dtypes of `_best_keys`."""
    users = queries.shape[0]
    return queries.new_empty((users, count), dtype=torch.int64), queries.new_empty((users,), dtype=torch.bool)


def _entry_starts(offsets: Tensor, added_items: Tensor, firsts: Tensor, catalogue: int) -> Tensor:
    """Return int64 [U, S]: the first entry of each user whose item is not below firsts [S]."""
    users = torch.arange(len(offsets) - 1, device=offsets.device)
    of_entries = users.repeat_interleave(offsets.diff(), output_size=len(added_items))
    wanted = users[:, None] * catalogue + firsts.clamp(max=catalogue)
    return torch.searchsorted(of_entries * catalogue + added_items, wanted)


@triton.jit
def _keys(scores, o_v):
    """Return the int64 keys of scores [BM, BN] of the items o_v [BN], as `score_keys.pack` does."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (4294967295 - o_v.to(tl.int64))[None, :]


@triton.jit(do_not_specialize=["U", "N", "H", "splits", "tiles"])
def _keep_best(
    queries_ptr,  # [U, D]
    queries_stride,
    items_ptr,  # [N, D]
    items_stride,
    excluded_ptr,  # [U, H], ascending in each row
    excluded_starts_ptr,  # [U, S]: columns of excluded from which a user's items are in the split or behind it
    allowed_ptr,  # [N]; read if ALLOWED
    added_starts_ptr,  # [U, S]: the same for entries; read if ADDED
    offsets_ptr,  # [U + 1]; read if ADDED
    added_items_ptr,  # [E]; read if ADDED
    values_ptr,  # [E]; read if ADDED
    parts_ptr,  # [U, S, BEST]
    broken_ptr,  # [S, U]
    U,
    N,
    D,
    H,
    splits,
    tiles,  # tiles of BN items in each split
    ADDED: tl.constexpr,
    ALLOWED: tl.constexpr,
    BEST: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write the best keys of BM users over one split of the catalogue, and how many scores are not finite.

    Excluded items and entries ascend, so that each has a cursor that moves on with the tiles. The best keys are not
    sorted: a key that is larger than the lowest of them takes its place.
    """
    o_u = tl.program_id(0) * BM + tl.arange(0, BM)
    m_u = o_u < U
    user = o_u.to(tl.int64)
    i_split = tl.program_id(1)
    b_q = load_rows(queries_ptr, queries_stride, o_u, m_u, tl.arange(0, BD), D)
    p_start = user * splits + i_split
    p_excluded = excluded_ptr + user * H
    column = tl.load(excluded_starts_ptr + p_start, mask=m_u, other=0)
    left_out = tl.load(p_excluded + column, mask=m_u & (column < H), other=N)
    if ADDED:
        entry = tl.load(added_starts_ptr + p_start, mask=m_u, other=0)
        end = tl.load(offsets_ptr + user + 1, mask=m_u, other=0)
        item = tl.load(added_items_ptr + entry, mask=m_u & (entry < end), other=N)
    # The keys of no item differ, so that a key replaces one of them alone.
    best = tl.zeros((BM, BEST), tl.int64) + NOTHING + tl.arange(0, BEST)[None, :]
    lowest = tl.min(best, 1)
    broken = tl.zeros((BM,), tl.int32)
    for i_tile in range(i_split * tiles, (i_split + 1) * tiles):
        first = i_tile * BN
        o_v = first + tl.arange(0, BN)
        m_v = o_v < N
        last = tl.minimum(first + BN, N)
        scores = tile_scores(
            b_q, queries_ptr, queries_stride, o_u, m_u, items_ptr, items_stride, o_v, m_v, D, BD, CHUNKS
        )
        if ADDED:
            while tl.min(item, 0) < last:
                is_here = item < last
                value = tl.load(values_ptr + entry, mask=is_here, other=0.0).to(tl.float32)
                scores += tl.where(item[:, None] == o_v[None, :], value[:, None], 0.0)
                entry += is_here.to(tl.int64)
                item = tl.load(added_items_ptr + entry, mask=m_u & (entry < end), other=N)
        is_finite = tl.abs(scores) < float("inf")
        broken += tl.sum(((is_finite == 0) & m_v[None, :]).to(tl.int32), 1)
        m_item = m_v
        if ALLOWED:
            m_item = m_v & (tl.load(allowed_ptr + o_v, mask=m_v, other=0) != 0)
        keys = tl.where(m_item[None, :], _keys(scores, o_v), NOTHING)
        while tl.min(left_out, 0) < last:
            keys = tl.where(left_out[:, None] == o_v[None, :], NOTHING, keys)
            column += (left_out < last).to(tl.int64)
            left_out = tl.load(p_excluded + column, mask=m_u & (column < H), other=N)
        top = tl.max(keys, 1)
        while tl.max((top > lowest).to(tl.int32), 0) > 0:
            replaced = (best == lowest[:, None]) & (top > lowest)[:, None]
            best = tl.where(replaced, top[:, None], best)
            keys = tl.where(keys == top[:, None], NOTHING, keys)
            lowest = tl.min(best, 1)
            top = tl.max(keys, 1)
    p_part = parts_ptr + p_start * BEST
    tl.store(p_part[:, None] + tl.arange(0, BEST)[None, :], best, mask=m_u[:, None])
    tl.store(broken_ptr + i_split * U + user, broken, mask=m_u)
