"""Two checkouts side by side: the same checkout twice gives equal losses and figures of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.benchmarks.two_checkouts import STEPS, compare

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_checkout_beside_itself_has_equal_losses(tmp_path):
    histories = [[1 + (user + 3 * i) % 40 for i in range(5 + user % 9)] for user in range(80)]
    dataset = write_dataset_folder(tmp_path / "toy", make_sequences(histories, items=40))
    result = compare(dataset, ROOT, rounds=1, without_compiler=False)
    assert result["largest_loss_difference"] == 0 and result["steps"] == STEPS
    before, after = result["before"], result["after"]
    assert before["dataset"] == after["dataset"] == "toy" and before["commit"] == after["commit"]
    assert result["ratio"] == after["p50_ms"] / before["p50_ms"] > 0
