"""The towers' pair on tensors without values: its launches can be counted and its kernels compiled without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from iisan_fast.kernels.gpu.projected_towers import ProjectedTowers

CATALOGUE = 20315  # rows of the tables: Scientific's items, and padding


def towers_on_meta(
    rows: Tensor,
    header: Tensor,
    dtype: torch.dtype,
    views: Sequence[tuple[int, ...]] = ((0,), (1,), (0, 1)),
    layers: int = 7,
    width: int = 768,
    bottleneck: int = 64,
    dim: int = 64,
    activation: str = "relu",
) -> ProjectedTowers:
    """Return gated towers over two tables, of these rows and the true count of this header, both on meta."""
    hidden = (len(views), layers, bottleneck)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    fold = SimpleNamespace(
        projection_operands=empty(len(views), dim, width, dtype=dtype),
        coefficients=empty(len(views), layers, 3),
        bias=empty(*hidden),
        composites=empty(*hidden, layers, bottleneck, dtype=dtype),
        projected_up=empty(*hidden, dim, dtype=dtype),
        vector_bias=empty(dim),
    )
    down = list(empty(*hidden, width, dtype=dtype))
    tables = [empty(CATALOGUE, layers, width, dtype=dtype) for _ in range(2)]
    pair = ProjectedTowers(fold, down, tables, rows, header, views, True, activation, dtype)
    pair.connect(empty(len(rows), dim))
    return pair
