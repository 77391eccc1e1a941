"""Item vectors go from the blocks of all ranks to their columns, and their gradients back."""

from __future__ import annotations

import pytest
import torch

from iisan_fast.kernels.gpu.shared_vectors import SharedVectors
from iisan_fast.kernels.types import StepShape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "distinct", "encoded"), [(2, 64, 32), (2, 96, 64), (3, 64, 32), (5, 32, 32)])
def test_column_v_is_the_vector_of_rank_v_modulo_the_ranks(ranks, distinct, encoded, dtype):
    shape = StepShape(4, distinct, 2, 16, 10, ranks)
    assert shape.encoded == encoded
    blocks = [torch.randn(encoded, 8) for _ in range(ranks)]
    shared = SharedVectors(blocks[0], shape, dtype)
    shared.gathered.copy_(torch.cat(blocks))
    shared.spread()
    expected = torch.stack([blocks[column % ranks][column // ranks] for column in range(distinct)])
    assert torch.equal(shared.vectors, expected) and torch.equal(shared.vector_operands, expected.to(dtype))
    assert (shared.vector_operands is shared.vectors) == (dtype == torch.float32)
    shared.of_vectors.copy_(torch.randn(distinct, 8))
    shared.of_gathered.fill_(float("nan"))
    shared.order()
    for rank, block in enumerate(shared.of_gathered.chunk(ranks)):
        columns = shared.of_vectors[rank::ranks]
        assert torch.equal(block[: len(columns)], columns) and not block[len(columns) :].any()
