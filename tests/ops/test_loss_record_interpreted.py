"""The record of losses in Triton equals that of `TrainingStep`, until the first loss that is not finite."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_cases import DEVICE
from iisan_fast.kernels.gpu.launch import launches
from iisan_fast.kernels.gpu.loss_record import LossRecord
from iisan_fast.kernels.types import HEADER, HEADER_WORDS

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
TILE_ROWS = 16


class Steps:
    """A record, and steps of invented losses to write into it."""

    def __init__(self, rows: int) -> None:
        self.losses = torch.empty(rows, device=DEVICE)
        self.header = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=DEVICE)
        self.record = torch.zeros(4, dtype=torch.float64, device=DEVICE)
        self.loss = torch.empty(1, device=DEVICE)
        self.steps = torch.zeros((), device=DEVICE)
        self.counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self._note = LossRecord(
            self.losses, self.header, TILE_ROWS, self.record, self.loss, self.steps, self.counter
        ).forward

    def note(self, step: int, tiles: int, losses: torch.Tensor) -> None:
        """Record a step whose rows lie anywhere in these tiles; losses beyond the tiles are NaN."""
        self.losses.fill_(float("nan"))
        self.losses[: tiles * TILE_ROWS] = 0
        self.losses[torch.randperm(tiles * TILE_ROWS)[: len(losses)].to(DEVICE)] = losses.to(DEVICE)
        for name, value in {"rows": len(losses), "tiles": tiles, "step": step}.items():
            self.header[HEADER.index(name)] = value
        self._note()


@pytest.mark.parametrize("tiles", [1, 3, 600])
def test_the_mean_and_the_sums(tiles):
    noted = Steps(rows=640 * TILE_ROWS)
    launches.clear()
    total = rows = 0
    for step in range(3):
        losses = 5 + torch.rand(tiles * TILE_ROWS - step)
        noted.note(step, tiles, losses)
        torch.testing.assert_close(noted.loss.cpu().squeeze().double(), losses.double().mean(), rtol=1e-7, atol=0)
        total, rows = total + losses.double().sum().item(), rows + len(losses)
    assert noted.record.tolist() == pytest.approx([total, rows, 0, 0], rel=1e-7)
    assert noted.steps.item() == 3 and noted.counter.tolist() == [3]
    assert launches == {"loss_record": 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_counts_after_a_loss_that_is_not_finite(bad):
    noted = Steps(rows=4 * TILE_ROWS)
    noted.note(0, 2, torch.full((7,), 2.0))
    noted.note(1, 2, torch.tensor([1.0, bad, 3.0]))
    first = noted.record.tolist()
    assert first[:3] == [14, 7, 2] and str(first[3]) == str(bad)
    noted.note(2, 1, torch.tensor([1.0]))
    noted.note(3, 1, torch.tensor([float("inf")]))
    assert torch.equal(noted.record.view(torch.int64).cpu(), torch.tensor(first, dtype=torch.float64).view(torch.int64))
    assert noted.steps.item() == 1 and noted.counter.tolist() == [2]
    assert noted.loss.item() == float("inf")
