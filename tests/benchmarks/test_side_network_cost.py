"""The side network of a training step, by its machine code for an H200: within its budget, without spills."""

from __future__ import annotations

import pytest
import torch

from helpers.launch_costs import Calls, costs_by_kernel
from helpers.towers_on_meta import CATALOGUE, towers_on_meta
from iisan_fast.kernels.types import StepBatch, StepShape

BUDGET_MS = 0.60  # of issue slots and memory traffic together, forward and backward, at 8,192 users
LOOPS = ("side_project", "side_weight_gradients", "side_mix_gradients")  # over the states


def calls(batch: StepBatch, shape: StepShape) -> Calls:
    """Return the calls of the towers' pair, on meta tensors in bf16."""
    pair = towers_on_meta(batch.distinct, batch.header, torch.bfloat16)
    return pair.forward, pair.backward


@pytest.mark.parametrize("users", [pytest.param(users, marks=pytest.mark.long) for users in (64, 8192)])
def test_the_side_network_is_within_its_budget(scientific, users):
    by_name = costs_by_kernel(scientific, users, CATALOGUE, calls)
    for name, (code, cost) in by_name.items():
        print(
            f"{name}: {code.registers} registers, {cost.issue_ms:.4f} ms of issue slots, {cost.bytes_ms:.4f} of bytes"
        )
        assert code.spilled <= 32 and code.shared <= 227 * 1024 and cost.unknown_loops == 0, name
    assert all(by_name[name][1].asynchronous for name in LOOPS)
    total = sum(cost.issue_ms + cost.bytes_ms for _, cost in by_name.values())
    print(f"together {total:.4f} ms")
    assert total <= (BUDGET_MS if users == 8192 else BUDGET_MS / 12)
