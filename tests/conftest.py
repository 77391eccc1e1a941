"""Fixtures that several test files share: real data where it is at hand, small stores and tables made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from iisan_fast.hidden_states import FeatureTable
from iisan_fast.sequences import Sequences, load_dataset

DATA = Path(os.environ.get("IISAN_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def scientific_folder() -> Path:
    """The Scientific dataset of the IISAN paper; tests that need it are skipped where it is absent."""
    folder = DATA / "amazon-scientific"
    if not folder.is_dir():
        pytest.skip(f"needs the Scientific dataset in {folder} (or under IISAN_FAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def scientific(scientific_folder: Path) -> Sequences:
    return load_dataset(scientific_folder).sequences


def random_table(shapes: list[tuple[int, int]], items: int, dtype=torch.float64, seed: int = 0) -> FeatureTable:
    """A feature table of random states; row 0 is zeros, as in any table."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(items + 1, *shape, generator=generator, dtype=dtype) for shape in shapes]
    for view in views:
        view[0] = 0
    return FeatureTable(tuple(views))


def make_sequences(histories: list[list[int]], items: int | None = None, max_inputs: int = 10) -> Sequences:
    """Sequences of hand-written histories of item numbers."""
    flat = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    offsets = np.cumsum([0, *map(len, histories)])
    count = items or int(flat.max())
    return Sequences(
        [f"u{i}" for i in range(len(histories))], [f"i{i}" for i in range(1, count + 1)], offsets, flat, max_inputs
    )
