"""The side network of a training step, by its machine code for an H200: within its budget, without spills."""

from __future__ import annotations

import pytest
import torch

from helpers.towers_on_meta import CATALOGUE, towers_on_meta
from iisan_fast.benchmarks.kernel_costs import KernelCost, KnownBatch, kernel_cost
from iisan_fast.benchmarks.machine_code import KernelReading, readings, specialization
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import Launch, recording
from iisan_fast.kernels.gpu.configurations import as_architecture
from iisan_fast.kernels.types import StepBatch

BUDGET_MS = 0.60  # of issue slots and memory traffic together, forward and backward, at 8,192 users
LOOPS = ("side_project", "side_weight_gradients", "side_mix_gradients")  # over the states


def costs(sequences: Sequences, users: int) -> dict[str, tuple[KernelReading, KernelCost]]:
    """Return the code and the cost of the pair's kernels for a run's first batch, by name, in bf16 for sm_90."""
    plan = RunPlan.of(sequences, users, seed=1)
    words = plan.pack(next(iter(plan.windows(0)))).words[0].numpy()
    buffer = torch.empty(len(words), dtype=torch.int32, device="meta")
    batch = StepBatch.of(buffer, plan.shape)
    recorded: list[Launch] = []
    with recording(recorded.append), as_architecture("sm_90"):
        pair = towers_on_meta(batch.distinct, batch.header, torch.bfloat16)
        pair.forward()
        pair.backward()
    known = KnownBatch(plan.shape, words, CATALOGUE)
    packed = {buffer.untyped_storage()._cdata: buffer}
    codes = readings([specialization(launch, 90) for launch in recorded])
    return {launch.name: (code, kernel_cost(launch, code, known, packed)) for launch, code in zip(recorded, codes)}


@pytest.mark.slow
@pytest.mark.parametrize("users", [pytest.param(64, marks=pytest.mark.long), 8192])
def test_the_side_network_is_within_its_budget(scientific, users):
    by_name = costs(scientific, users)
    for name, (code, cost) in by_name.items():
        print(
            f"{name}: {code.registers} registers, {cost.issue_ms:.4f} ms of issue slots, {cost.bytes_ms:.4f} of bytes"
        )
        assert code.spilled <= 32 and code.shared <= 227 * 1024 and cost.unknown_loops == 0, name
    assert all(by_name[name][1].asynchronous for name in LOOPS)
    total = sum(cost.issue_ms + cost.bytes_ms for _, cost in by_name.values())
    print(f"together {total:.4f} ms")
    assert total <= (BUDGET_MS if users == 8192 else BUDGET_MS / 12)
