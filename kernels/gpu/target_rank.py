"""The rank of a target in Triton: the items that score higher are counted tile by tile; no scores are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import configuration
from .launch import block, launch


def target_rank(
    queries: Tensor, items: Tensor, targets: Tensor, excluded: Tensor, tie_share: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return the reference's two ranks, float64 [U]; the caller has checked the arguments."""
    queries, items, excluded = (x if x.stride(1) == 1 else x.contiguous() for x in (queries, items, excluded))
    higher, ties, own_higher, own_ties, broken = _counts(queries, items, targets.contiguous(), excluded).unbind(1)
    is_broken = broken > 0
    unmasked = (1 + higher + tie_share * ties.double()).masked_fill(is_broken, float("nan"))
    masked = unmasked - own_higher - tie_share * own_ties.double()
    unreachable = (excluded == targets[:, None]).any(dim=1) & ~is_broken
    return masked.masked_fill(unreachable, float("inf")), unmasked


@torch.library.custom_op("iisan_fast::target_counts", mutates_args=())
def _counts(queries: Tensor, items: Tensor, targets: Tensor, excluded: Tensor) -> Tensor:
    """Return counts int64 [U, 5] for each user.

    They are: items that score higher than the target, other items that tie with it, the same two counts among the
    excluded items, and scores that are not finite.
    """
    users, catalogue = len(queries), len(items)
    chosen = configuration("target_rank", users, queries.dtype, queries.device, queries.shape[1])
    blocks = {name: chosen.blocks[name] for name in ("BM", "BN")}
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
        excluded,
        excluded.stride(0),
        parts,
        users,
        catalogue,
        queries.shape[1],
        triton.cdiv(tiles, splits),
        EXCLUDED=excluded.shape[1],
        BD=block(queries.shape[1], most=1 << 20),
        **blocks,
    )
    return parts.sum(0)


@_counts.register_fake
def _(queries, items, targets, excluded):
    """Return empty tensors with the shapes and dtypes of `_counts`."""
    return queries.new_empty((queries.shape[0], 5), dtype=torch.int64)


@triton.jit
def _tile(ptr, stride, rows, m_rows, o_d, D):
    """Load rows of a matrix, 0 beyond column D and where m_rows is False."""
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["U", "N", "tiles"])
def _count(
    queries_ptr,  # [U, D]
    queries_stride,
    items_ptr,  # [N, D]
    items_stride,
    targets_ptr,  # [U]
    excluded_ptr,  # [U, H]
    excluded_stride,
    parts_ptr,  # [S, U, 5]
    U,
    N,
    D,
    tiles,  # tiles of BN items in each split
    EXCLUDED: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write the counts of BM users over one split of the catalogue.

    A target's score comes from a product of the same shape as all others (BM targets in place of BN items), so that
    equal vectors give exactly equal scores. fp32 is multiplied as IEEE, because TF32 would create ties.
    """
    tl.static_assert(BM == BN)
    o_u = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_u = o_u < U
    i_split = tl.program_id(1)
    b_q = _tile(queries_ptr, queries_stride, o_u, m_u, o_d, D)
    target = tl.load(targets_ptr + o_u, mask=m_u, other=0)
    b_t = _tile(items_ptr, items_stride, target, m_u, o_d, D)
    diagonal = tl.arange(0, BM)[:, None] == tl.arange(0, BN)[None, :]
    score = tl.sum(tl.where(diagonal, tl.dot(b_q, b_t.T, input_precision="ieee"), 0.0), 1)
    higher, ties, own_higher, own_ties, broken = (tl.zeros((BM,), tl.int32),) * 5
    for i_tile in range(i_split * tiles, (i_split + 1) * tiles):
        o_v = i_tile * BN + tl.arange(0, BN)
        m_v = o_v < N
        scores = tl.dot(b_q, _tile(items_ptr, items_stride, o_v, m_v, o_d, D).T, input_precision="ieee")
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
