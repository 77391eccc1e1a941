"""Add up the parts of a gradient that several programs wrote, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configurations import only_configuration
from .launch import launch

UNROLLED = 8  # parts that are loaded at the same time


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Write the sums over the first dimension of fp32 parts [S, …] to `out`, fp32 with as many elements as a part."""
    chosen = only_configuration("sum_parts", parts.device)
    count = out.numel()
    launch(
        _sum_parts,
        "sum_parts",
        (triton.cdiv(count, chosen.blocks["BLOCK"]),),
        chosen,
        parts,
        out,
        count,
        S=len(parts),
        UNROLLED=UNROLLED,
        **chosen.blocks,
    )


@triton.jit
def _sum_parts(
    parts_ptr,  # [S, count]
    out_ptr,  # [count]
    count,
    S: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up BLOCK elements of the S parts, in the order of the parts."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, S, UNROLLED):
        for i in tl.static_range(UNROLLED):
            p_part = parts_ptr + tl.cast(first + i, tl.int64) * count + offset
            total += tl.load(p_part, mask=mask & (first + i < S), other=0.0)
    tl.store(out_ptr + offset, total, mask=mask)
