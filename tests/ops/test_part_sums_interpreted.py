"""Sums of parts in Triton: the values are correct, added in order, and nothing is written beyond them."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_cases import DEVICE
from iisan_fast.kernels.gpu.part_sums import sum_parts


@pytest.mark.parametrize(("parts", "shape"), [(1, (3,)), (7, (40, 33)), (8, (513,)), (19, (2, 512))])
def test_sums_of_parts(parts, shape):
    values = torch.randn(parts, *shape, device=DEVICE)
    whole = torch.full((2, *shape), float("nan"), device=DEVICE)
    sum_parts(values, whole[0])
    expected = torch.zeros(shape, device=DEVICE)
    for part in values:
        expected += part
    assert torch.equal(whole[0], expected) and whole[1].isnan().all()
