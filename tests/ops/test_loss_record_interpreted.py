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
    """A record, and steps of invented losses to write into it. share: of this rank, where there are several."""

    def __init__(self, rows: int, share: torch.Tensor | None = None) -> None:
        self.losses = torch.empty(rows, device=DEVICE)
        self.header = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=DEVICE)
        self.record = torch.zeros(4, dtype=torch.float64, device=DEVICE)
        self.loss = torch.empty(1, device=DEVICE)
        self.steps = torch.zeros((), device=DEVICE)
        self.counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.op = LossRecord(
            self.losses, self.header, TILE_ROWS, self.record, self.loss, self.steps, self.counter, share
        )

    def note(self, step: int, tiles: int, losses: torch.Tensor, rows: int = 0) -> None:
        """Record a step whose rows lie anywhere in these tiles; losses beyond the tiles are NaN.

        rows: of all ranks; 0: as many as there are losses.
        """
        self.losses.fill_(float("nan"))
        self.losses[: tiles * TILE_ROWS] = 0
        self.losses[torch.randperm(tiles * TILE_ROWS)[: len(losses)].to(DEVICE)] = losses.to(DEVICE)
        for name, value in {"rows": rows or len(losses), "tiles": tiles, "step": step}.items():
            self.header[HEADER.index(name)] = value
        self.op.forward()


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


def test_the_sum_of_all_ranks_shares_counts_as_the_whole_batch_does():
    """One of three ranks has no rows. A share that is not finite fails the step on all ranks alike."""
    losses = torch.arange(1.0, 21.0)
    whole = Steps(rows=2 * TILE_ROWS)
    share = torch.zeros(2, device=DEVICE)
    ranks = Steps(rows=2 * TILE_ROWS, share=share)
    for step, bad in enumerate([0.0, 0.0, float("nan"), 0.0]):
        whole.note(step, 2, losses + bad)
        shares = []
        for tiles, part in ((1, losses[:9] + bad), (0, losses[:0]), (2, losses[9:])):
            before = [tensor.clone() for tensor in (ranks.record, ranks.steps, ranks.counter)]
            ranks.note(step, tiles, part, rows=20)
            after = [ranks.record, ranks.steps, ranks.counter]
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
            shares.append(share[0].item())
        share[0] = sum(shares)
        ranks.op.count()
        torch.testing.assert_close(ranks.loss, whole.loss, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(ranks.record, whole.record, rtol=1e-6, atol=0, equal_nan=True)
        assert (ranks.steps, ranks.counter) == (whole.steps, whole.counter)
    assert whole.record[2] == 3 and whole.steps == 2 and share[1] == 0
