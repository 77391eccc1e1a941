"""The loss of a training step, by its machine code for an H200: within its budget, without spills, copies under way."""

from __future__ import annotations

import pytest
import torch

from iisan_fast.benchmarks.kernel_costs import KernelCost, KnownBatch, kernel_cost
from iisan_fast.benchmarks.machine_code import KernelReading, readings, specialization
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import Launch, recording
from iisan_fast.kernels.gpu.configurations import as_architecture
from iisan_fast.kernels.gpu.inbatch_cross_entropy import InbatchCrossEntropy
from iisan_fast.kernels.gpu.item_vector_gradients import ItemVectorGradients
from iisan_fast.kernels.types import StepBatch

D = 64
BUDGET_MS = 0.50  # of issue slots, forward and backward, at 8,192 users
LOOPS = ("loss_forward", "loss_query_gradients", "loss_item_gradients")  # whose loops multiply matrices


def costs(sequences: Sequences, users: int) -> dict[str, tuple[KernelReading, KernelCost]]:
    """Return the code and the cost of the kernels of both pairs for a run's first batch, by name, in bf16 for sm_90."""
    plan = RunPlan.of(sequences, users, seed=1)
    shape = plan.shape
    words = plan.pack(next(iter(plan.windows(0)))).words[0].numpy()

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    buffer = empty(len(words), dtype=torch.int32)
    batch = StepBatch.of(buffer, shape)
    states, vectors = (empty(size, D, dtype=torch.bfloat16) for size in (shape.rows, shape.distinct))
    columns = empty(shape.distinct), empty(shape.distinct)
    recorded: list[Launch] = []
    with recording(recorded.append), as_architecture("sm_90"):
        loss = InbatchCrossEntropy(states, vectors, batch, *columns, shape, torch.bfloat16)
        collect = ItemVectorGradients(loss, empty(shape.rows, D))
        for run in (loss.forward, loss.backward, collect.backward):
            run()
    known = KnownBatch(shape, words, table_rows=len(sequences.item_ids) + 1)
    packed = {buffer.untyped_storage()._cdata: buffer}
    codes = readings([specialization(launch, 90) for launch in recorded])
    return {launch.name: (code, kernel_cost(launch, code, known, packed)) for launch, code in zip(recorded, codes)}


@pytest.mark.slow
@pytest.mark.parametrize("users", [pytest.param(64, marks=pytest.mark.long), 8192])
def test_the_loss_is_within_its_budget_of_issue_slots(scientific, users):
    by_name = costs(scientific, users)
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
