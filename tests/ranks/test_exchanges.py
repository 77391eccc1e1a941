"""The exchanges between ranks: blocks, sums, gradients, objects and errors."""

from __future__ import annotations

import pytest
import torch

from helpers.rank_calls import exchanges
from helpers.rank_processes import run_on_ranks
from iisan_fast.ranks import ALONE


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("count", [2, 3])
def test_every_exchange_gives_all_ranks_what_one_process_would_have(count, rows):
    values = torch.arange(rows * 2, dtype=torch.float64).view(rows, 2) + 1
    results = run_on_ranks(count, exchanges, values)
    weights = count * (count + 1) // 2
    gradients = torch.cat([result["gradient"] for result in results])
    assert torch.equal(gradients, 2 * weights * values)
    for rank, result in enumerate(results):
        assert torch.equal(result["whole"], values)
        assert torch.equal(result["sum"], weights * values)
        expected = [[sender, rank] for sender in range(count) for _ in range(rank + 1)]
        assert result["exchanged"].tolist() == expected
        assert result["values"] == list(range(count))
        assert result["first"] == {"rank": 0}
        assert result["on_first"] == 0
        assert result["errors"] == ["bad input", "bad input"]


def test_one_process_exchanges_nothing():
    rows = torch.arange(6.0).view(3, 2)
    assert ALONE.gather_blocks(rows, 2).tolist() == rows[:2].tolist()
    assert ALONE.add_blocks(rows) is rows
    assert ALONE.block(3) == slice(0, 3)
    assert ALONE.all_do(lambda: 5) == ALONE.first_does(lambda: 5) == 5
