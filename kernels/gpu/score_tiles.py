"""Tiles of scores, users by items, in Triton: their sizes, and the products that all kernels of scores share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configurations import Configuration, configuration
from .launch import block

WHOLE_ROW, CHUNK = 128, 64  # columns


def tile_sizes(kernel: str, queries: Tensor) -> tuple[Configuration, dict[str, int]]:
    """Return a kernel's configuration for these queries [U, d], and its tile sizes.

    Rows of up to `WHOLE_ROW` numbers are multiplied at once, longer ones `CHUNK` numbers at a time.
    """
    users, d = queries.shape
    chosen = configuration(kernel, users, queries.dtype, queries.device, d)
    columns = block(d, most=WHOLE_ROW) if d <= WHOLE_ROW else CHUNK
    sizes = {name: chosen.blocks[name] for name in ("BM", "BN")}
    return chosen, {"BD": columns, "CHUNKS": triton.cdiv(d, columns), **sizes}


@triton.jit
def load_rows(ptr, stride, rows, m_rows, o_d, D):
    """Load rows of a matrix, 0 beyond column D and where m_rows is False."""
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit
def tile_scores(
    b_q,  # [BM, BD]: the first BD columns of the queries of the users o_u
    queries_ptr,
    queries_stride,
    o_u,
    m_u,
    items_ptr,
    items_stride,
    o_v,
    m_v,
    D,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Return the dot products [BM, BN] of the users o_u [BM] and the items o_v [BN].

    All products have one shape, so that equal vectors give exactly equal scores. fp32 is multiplied as IEEE, because
    TF32 would create ties.
    """
    o_d = tl.arange(0, BD)
    scores = tl.dot(b_q, load_rows(items_ptr, items_stride, o_v, m_v, o_d, D).T, input_precision="ieee")
    for i in range(1, CHUNKS):
        b_q = load_rows(queries_ptr, queries_stride, o_u, m_u, i * BD + o_d, D)
        b_v = load_rows(items_ptr, items_stride, o_v, m_v, i * BD + o_d, D)
        scores = tl.dot(b_q, b_v.T, scores, input_precision="ieee")
    return scores
