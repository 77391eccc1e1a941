"""Feature tables of random states."""

from __future__ import annotations

import torch

from iisan_fast.states.feature_table import FeatureTable


def random_table(shapes: list[tuple[int, int]], items: int, dtype=torch.float64, seed: int = 0) -> FeatureTable:
    """Return a feature table of random states; row 0 is zeros, as in any table."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(items + 1, *shape, generator=generator, dtype=dtype) for shape in shapes]
    for view in views:
        view[0] = 0
    return FeatureTable(tuple(views))
