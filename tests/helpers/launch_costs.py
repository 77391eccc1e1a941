"""The code and the least cost on an H200 of a pair's kernels, for the first batch of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from iisan_fast.benchmarks.kernel_costs import KernelCost, KnownBatch, kernel_cost
from iisan_fast.benchmarks.machine_code import KernelReading, readings, specialization
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import Launch, recording
from iisan_fast.kernels.gpu.configurations import as_architecture
from iisan_fast.kernels.types import StepBatch, StepShape

Calls = Sequence[Callable[[], None]]


def costs_by_kernel(
    sequences: Sequences, users: int, table_rows: int, make_calls: Callable[[StepBatch, StepShape], Calls]
) -> dict[str, tuple[KernelReading, KernelCost]]:
    """Return each kernel's code and cost in bf16 for sm_90, by name.

    users: users a batch. table_rows: rows of the tables of hidden states. make_calls: builds the pairs on meta tensors
    for a batch, and returns the calls that launch their kernels.
    """
    plan = RunPlan.of(sequences, users, seed=1)
    words = plan.pack(next(iter(plan.windows(0)))).words[0].numpy()
    buffer = torch.empty(len(words), dtype=torch.int32, device="meta")
    recorded: list[Launch] = []
    with recording(recorded.append), as_architecture("sm_90"):
        for call in make_calls(StepBatch.of(buffer, plan.shape), plan.shape):
            call()
    known = KnownBatch(plan.shape, words, table_rows)
    packed = {buffer.untyped_storage()._cdata: buffer}
    codes = readings([specialization(launch, 90) for launch in recorded])
    return {launch.name: (code, kernel_cost(launch, code, known, packed)) for launch, code in zip(recorded, codes)}
