"""The sums of the workers' parts, added up in C++."""

from __future__ import annotations

import pytest
import torch

from helpers.compiler import needs_compiler
from iisan_fast.kernels.cpu import sums

pytestmark = needs_compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1, 7, 64, 1 << 16])
def test_each_total_is_the_first_part_and_the_sum_of_all_in_their_order(dtype, limit, monkeypatch):
    monkeypatch.setattr(sums, "MOST_NUMBERS", limit)
    generator = torch.Generator().manual_seed(0)
    shapes = [((3, 5), 3), ((64,), 1), ((), 2), ((0, 4), 2), ((2, 3, 4), 4)]
    parts = [[torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)] for shape, count in shapes]
    expected = [sum(tensors[1:], tensors[0].clone()) for tensors in parts]
    totals = sums.add_up(parts)
    assert all(total is tensors[0] for total, tensors in zip(totals, parts, strict=True))
    assert all(map(torch.equal, totals, expected))
