"""The rank of a target in Triton: the items that score higher are counted tile by tile; no scores are stored.

A second kernel computes the scores of the few items with an added score once more, and corrects the counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import AddedScores
from .launch import launch
from .score_tiles import load_rows, tile_scores, tile_sizes


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the reference's two ranks, float64 [U]; the caller has checked the arguments.

    Scores are fp32 in every dtype, and so is the sum of a score and what is added to it.
    """
    queries, items, excluded = (x if x.stride(1) == 1 else x.contiguous() for x in (queries, items, excluded))
    targets = targets.contiguous()
    if added is None:
        counts = _counts(queries, items, targets, excluded, None)
    else:
        users = torch.arange(len(targets), device=targets.device)
        of_targets = added.values_of(users, targets, len(items))
        counts = _counts(queries, items, targets, excluded, of_targets)
        entries = (part.contiguous() for part in added)
        counts = counts + _corrections(queries, items, targets, excluded, of_targets, *entries)
    higher, ties, own_higher, own_ties, broken = counts.unbind(1)
    is_broken = broken > 0
    unmasked = (1 + higher + tie_share * ties.double()).masked_fill(is_broken, float("nan"))
    masked = unmasked - own_higher - tie_share * own_ties.double()
    unreachable = (excluded == targets[:, None]).any(dim=1) & ~is_broken
    return masked.masked_fill(unreachable, float("inf")), unmasked


@torch.library.custom_op("iisan_fast::target_counts", mutates_args=())
def _counts(queries: Tensor, items: Tensor, targets: Tensor, excluded: Tensor, of_targets: Tensor | None) -> Tensor:
    """Return counts int64 [U, 5] for each user; nothing is added to a score but of_targets [U], to the targets'.

    They are: items that score higher than the target, other items that tie with it, the same two counts among the
    excluded items, and scores that are not finite.
    """
    users, catalogue = len(queries), len(items)
    chosen, blocks = tile_sizes("target_rank", queries)
    user_tiles, tiles = triton.cdiv(users, blocks["BM"]), triton.cdiv(catalogue, blocks["BN"])
    splits = max(1, min(tiles, chosen.blocks["PROGRAMS"] // max(1, user_tiles)))
    parts = torch.empty((splits, users, 5), dtype=torch.int32, device=queries.device)
    launch(
        _count,
        "target_rank",
        (user_tiles, splits),
        chosen,
        queries,
        queries.stride(0),
        items,
        items.stride(0),
        targets,
        targets if of_targets is None else of_targets,
        excluded,
        excluded.stride(0),
        parts,
        users,
        catalogue,
        queries.shape[1],
        triton.cdiv(tiles, splits),
        ADDED=of_targets is not None,
        EXCLUDED=excluded.shape[1],
        **blocks,
    )
    return parts.sum(0)


@_counts.register_fake
def _(queries, items, targets, excluded, of_targets):
    """Return empty tensors with the shapes and dtypes of `_counts`."""
    return queries.new_empty((queries.shape[0], 5), dtype=torch.int64)


@torch.library.custom_op("iisan_fast::target_count_corrections", mutates_args=())
def _corrections(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    of_targets: Tensor,
    offsets: Tensor,
    added_items: Tensor,
    values: Tensor,
) -> Tensor:
    """Return int32 [U, 5]: how the counts of `_counts` change as the values are added to scores."""
    users = len(queries)
    chosen, blocks = tile_sizes("target_rank_added", queries)
    user_tiles, tiles = triton.cdiv(users, blocks["BM"]), triton.cdiv(len(added_items), blocks["BN"])
    splits = max(1, min(tiles, chosen.blocks["PROGRAMS"] // max(1, user_tiles)))
    corrections = torch.zeros((users, 5), dtype=torch.int32, device=queries.device)
    launch(
        _correct,
        "target_rank_added",
        (user_tiles, splits),
        chosen,
        queries,
        queries.stride(0),
        items,
        items.stride(0),
        targets,
        of_targets,
        excluded,
        excluded.stride(0),
        offsets,
        added_items,
        values,
        corrections,
        users,
        queries.shape[1],
        splits,
        EXCLUDED=excluded.shape[1],
        **blocks,
    )
    return corrections


@_corrections.register_fake
def _(queries, items, targets, excluded, of_targets, offsets, added_items, values):
    """Return empty tensors with the shapes and dtypes of `_corrections`."""
    return queries.new_empty((queries.shape[0], 5), dtype=torch.int32)


@triton.jit(do_not_specialize=["U", "N", "tiles"])
def _count(
    queries_ptr,  # [U, D]
    queries_stride,
    items_ptr,  # [N, D]
    items_stride,
    targets_ptr,  # [U]
    of_targets_ptr,  # [U]; read if ADDED
    excluded_ptr,  # [U, H]
    excluded_stride,
    parts_ptr,  # [S, U, 5]
    U,
    N,
    D,
    tiles,  # tiles of BN items in each split
    ADDED: tl.constexpr,
    EXCLUDED: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write the counts of BM users over one split of the catalogue.

    A target's score comes from a product with BM targets in place of BN items.
    """
    tl.static_assert(BM == BN)
    o_u = tl.program_id(0) * BM + tl.arange(0, BM)
    m_u = o_u < U
    i_split = tl.program_id(1)
    b_q = load_rows(queries_ptr, queries_stride, o_u, m_u, tl.arange(0, BD), D)
    target = tl.load(targets_ptr + o_u, mask=m_u, other=0)
    diagonal = tl.arange(0, BM)[:, None] == tl.arange(0, BN)[None, :]
    scores = tile_scores(
        b_q, queries_ptr, queries_stride, o_u, m_u, items_ptr, items_stride, target, m_u, D, BD, CHUNKS
    )
    score = tl.sum(tl.where(diagonal, scores, 0.0), 1)
    if ADDED:
        score += tl.load(of_targets_ptr + o_u, mask=m_u, other=0.0).to(tl.float32)
    higher, ties, own_higher, own_ties, broken = (tl.zeros((BM,), tl.int32),) * 5
    for i_tile in range(i_split * tiles, (i_split + 1) * tiles):
        o_v = i_tile * BN + tl.arange(0, BN)
        m_v = o_v < N
        scores = tile_scores(
            b_q, queries_ptr, queries_stride, o_u, m_u, items_ptr, items_stride, o_v, m_v, D, BD, CHUNKS
        )
        is_own = tl.zeros((BM, BN), tl.int1)
        for i in range(EXCLUDED):
            item = tl.load(excluded_ptr + o_u.to(tl.int64) * excluded_stride + i, mask=m_u, other=-1)
            is_own = is_own | (item[:, None] == o_v[None, :])
        is_other = (target[:, None] != o_v[None, :]) & m_v[None, :]
        is_higher = (scores > score[:, None]) & is_other
        is_tie = (scores == score[:, None]) & is_other
        is_finite = tl.abs(scores) < float("inf")
        higher += tl.sum(is_higher.to(tl.int32), 1)
        ties += tl.sum(is_tie.to(tl.int32), 1)
        own_higher += tl.sum((is_higher & is_own).to(tl.int32), 1)
        own_ties += tl.sum((is_tie & is_own).to(tl.int32), 1)
        broken += tl.sum(((is_finite == 0) & m_v[None, :]).to(tl.int32), 1)
    p_part = parts_ptr + (i_split * U + o_u).to(tl.int64) * 5
    tl.store(p_part, higher, mask=m_u)
    tl.store(p_part + 1, ties, mask=m_u)
    tl.store(p_part + 2, own_higher, mask=m_u)
    tl.store(p_part + 3, own_ties, mask=m_u)
    tl.store(p_part + 4, broken, mask=m_u)


@triton.jit(do_not_specialize=["U", "splits"])
def _correct(
    queries_ptr,  # [U, D]
    queries_stride,
    items_ptr,  # [N, D]
    items_stride,
    targets_ptr,  # [U]
    of_targets_ptr,  # [U]
    excluded_ptr,  # [U, H]
    excluded_stride,
    offsets_ptr,  # [U + 1]
    added_items_ptr,  # [E]
    values_ptr,  # [E]
    corrections_ptr,  # [U, 5]: zeros
    U,
    D,
    splits,
    EXCLUDED: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add to the counts of BM users how they change over one split of these users' entries.

    BN entries at a time are scored for all BM users, and the score of an entry is the one for its user. Sums of
    integers do not depend on the order of the programs.
    """
    tl.static_assert(BM == BN)
    o_m = tl.arange(0, BM)
    first_user = tl.program_id(0) * BM
    o_u = first_user + o_m
    m_u = o_u < U
    b_q = load_rows(queries_ptr, queries_stride, o_u, m_u, tl.arange(0, BD), D)
    of_row = tl.load(targets_ptr + o_u, mask=m_u, other=0)
    diagonal = o_m[:, None] == tl.arange(0, BN)[None, :]
    scores = tile_scores(
        b_q, queries_ptr, queries_stride, o_u, m_u, items_ptr, items_stride, of_row, m_u, D, BD, CHUNKS
    )
    row_score = tl.sum(tl.where(diagonal, scores, 0.0), 1)
    row_score += tl.load(of_targets_ptr + o_u, mask=m_u, other=0.0).to(tl.float32)
    first = tl.load(offsets_ptr + first_user)
    count = (tl.load(offsets_ptr + tl.minimum(first_user + BM, U)) - first).to(tl.int32)
    start = (tl.load(offsets_ptr + o_u, mask=m_u, other=0) - first).to(tl.int32)
    end = (tl.load(offsets_ptr + o_u + 1, mask=m_u, other=0) - first).to(tl.int32)
    for i_tile in range(tl.program_id(1), tl.cdiv(count, BN), splits):
        o_e = i_tile * BN + tl.arange(0, BN)
        m_e = o_e < count
        o_v = tl.load(added_items_ptr + first + o_e, mask=m_e, other=0)
        value = tl.load(values_ptr + first + o_e, mask=m_e, other=0.0).to(tl.float32)
        scores = tile_scores(
            b_q, queries_ptr, queries_stride, o_u, m_u, items_ptr, items_stride, o_v, m_e, D, BD, CHUNKS
        )
        is_here = (start[:, None] <= o_e[None, :]) & (o_e[None, :] < end[:, None])
        base = tl.sum(tl.where(is_here, scores, 0.0), 0)
        score = tl.sum(tl.where(is_here, row_score[:, None], 0.0), 0)
        user = (first_user + tl.sum(tl.where(is_here, o_m[:, None], 0), 0)).to(tl.int64)
        is_own = tl.zeros((BN,), tl.int1)
        for i in range(EXCLUDED):
            is_own = is_own | (tl.load(excluded_ptr + user * excluded_stride + i, mask=m_e, other=-1) == o_v)
        total = base + value
        is_other = (tl.load(targets_ptr + user, mask=m_e, other=0) != o_v) & m_e
        higher = (total > score).to(tl.int32) - (base > score).to(tl.int32)
        ties = (total == score).to(tl.int32) - (base == score).to(tl.int32)
        p_count = corrections_ptr + user * 5
        changes_higher = is_other & (higher != 0)
        changes_ties = is_other & (ties != 0)
        is_finite = tl.abs(total) < float("inf")
        tl.atomic_add(p_count, higher, mask=changes_higher, sem="relaxed")
        tl.atomic_add(p_count + 1, ties, mask=changes_ties, sem="relaxed")
        tl.atomic_add(p_count + 2, higher, mask=changes_higher & is_own, sem="relaxed")
        tl.atomic_add(p_count + 3, ties, mask=changes_ties & is_own, sem="relaxed")
        tl.atomic_add(p_count + 4, tl.full((BN,), 1, tl.int32), mask=(is_finite == 0) & m_e, sem="relaxed")
