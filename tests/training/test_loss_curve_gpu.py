"""Check on a GPU that training by the kernels follows training by the reference."""

from __future__ import annotations

import os
import unittest.mock

import numpy as np
import pytest
import torch

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import epoch_batches
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels.gpu.launch import launches
from iisan_fast.states.feature_table import FeatureTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def toy_histories(users: int, items: int) -> Sequences:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 14, users)
    return make_sequences([rng.integers(1, items + 1, length).tolist() for length in lengths], items=items)


def loss_curve(
    device: str, table: FeatureTable, sequences: Sequences, config: ModelConfig, steps: int, batch_users: int = 64
) -> list[float]:
    """Return the losses of the first steps of training, with dropout and Adam on float32 weights."""
    model = (
        side_recommender(table.shapes, config, sequences.max_inputs, sequences.popularity, seed=0).to(device).train()
    )
    table = FeatureTable(tuple(view.to(device) for view in table.views))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses: list[float] = []
    for epoch in range(steps):
        for batch in epoch_batches(sequences, batch_users, seed=0, epoch=epoch):
            if len(losses) == steps:
                return losses
            optimizer.zero_grad()
            batch = batch.to(torch.device(device))
            loss = model.loss(batch, table.read(batch.distinct))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def check_curve(
    device: str, config: ModelConfig, shapes: list[tuple[int, int]], dtype: torch.dtype, rtol: float
) -> None:
    sequences = toy_histories(users=256, items=600)
    table = random_table(shapes, 600, dtype=dtype)
    curves = {}
    for name in ("reference", "gpu"):
        launches.clear()
        with unittest.mock.patch.dict(os.environ, {kernels.FORM_VARIABLE: name}):
            curves[name] = loss_curve(device, table, sequences, config, steps=32)
        assert bool(launches) == (name == "gpu")
    assert np.mean(curves["reference"][-4:]) < np.mean(curves["reference"][:4])
    np.testing.assert_allclose(curves["gpu"], curves["reference"], rtol=rtol)


# Over these steps, the reference's losses in fp32 and fp64 differ by up to 2e-5. Larger learning rates would let Adam
# magnify rounding. With half tables, the kernels round the operands of every product; the same rounding in the
# reference changes its losses by up to 1.4e-4.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("method", ["iisan", "iisan-versa"])
def test_training_follows_the_references_curve(method, dtype, rtol):
    shapes = [(7, 768), (7, 768)] if method == "iisan" else [(6, 768), (4, 384)]
    check_curve("cuda", ModelConfig(method=method), shapes, dtype, rtol)
