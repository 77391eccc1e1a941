"""A Triton kernel with every kind of loop, for tests of code that reads compiled kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def all_loops(
    header_ptr,  # [2]: a number that is not read, then the rows
    left_ptr,  # [rows, n]
    right_ptr,  # [n, BLOCK]
    out_ptr,  # [rows, BLOCK]
    n,
    BLOCK: tl.constexpr,
):
    """Multiply a tile of rows, then add what nested loops and a loop with a condition read."""
    i_tile = tl.program_id(0)
    rows = tl.load(header_ptr + 1)
    if i_tile * BLOCK >= rows:
        return
    o_m = i_tile * BLOCK + tl.arange(0, BLOCK)
    o_n = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i_k in range(0, n, BLOCK):
        left = tl.load(left_ptr + o_m[:, None] * n + i_k + o_n[None, :])
        right = tl.load(right_ptr + (i_k + o_n)[:, None] * BLOCK + o_n[None, :])
        total = tl.dot(left, right, total)
    extra = 0.0
    for i in range(0, i_tile):
        for j in range(0, i + 2):
            extra += tl.exp2(extra + tl.load(left_ptr + i * n + j).to(tl.float32))
    last = rows
    while last > 40:
        extra += tl.exp2(extra - tl.load(right_ptr + last).to(tl.float32))
        last -= 25
    tl.store(out_ptr + o_m[:, None] * BLOCK + o_n[None, :], total + extra, mask=(o_m < rows)[:, None])
