"""The loss of a training step, by its machine code for an H200: within its budget, without spills, copies under way."""

from __future__ import annotations

import pytest
import torch

from helpers.launch_costs import Calls, costs_by_kernel
from iisan_fast.kernels.gpu.inbatch_cross_entropy import InbatchCrossEntropy
from iisan_fast.kernels.gpu.item_vector_gradients import ItemVectorGradients
from iisan_fast.kernels.types import StepBatch, StepShape

D = 64
BUDGET_MS = 0.50  # of issue slots, forward and backward, at 8,192 users
LOOPS = ("loss_forward", "loss_query_gradients", "loss_item_gradients")  # whose loops multiply matrices


def calls(batch: StepBatch, shape: StepShape) -> Calls:
    """Return the calls of the loss's pair and of the items' gradients, on meta tensors in bf16."""

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    states, vectors = (empty(size, D, dtype=torch.bfloat16) for size in (shape.rows, shape.distinct))
    columns = empty(shape.distinct), empty(shape.distinct)
    loss = InbatchCrossEntropy(states, vectors, batch, *columns, shape, torch.bfloat16)
    collect = ItemVectorGradients(loss, empty(shape.rows, D))
    return loss.forward, loss.backward, collect.backward


@pytest.mark.slow
@pytest.mark.parametrize("users", [pytest.param(64, marks=pytest.mark.long), 8192])
def test_the_loss_is_within_its_budget_of_issue_slots(scientific, users):
    by_name = costs_by_kernel(scientific, users, len(scientific.item_ids) + 1, calls)
    for name, (code, cost) in by_name.items():
        print(f"{name}: {code.registers} registers, {cost.per_element} a tile element, {cost.issue_ms:.4f} ms")
        assert code.spilled == 0 and code.shared <= 99 * 1024 and cost.unknown_loops == 0, name
    assert all(by_name[name][1].asynchronous for name in LOOPS)
    total = sum(cost.issue_ms for _, cost in by_name.values())
    if users == 64:
        assert total < BUDGET_MS / 100
    else:
        assert total <= BUDGET_MS
        limits = dict(zip(LOOPS, (12.5, 10.5, 11.5)))
        assert all(by_name[name][1].per_element <= limits[name] for name in LOOPS)
