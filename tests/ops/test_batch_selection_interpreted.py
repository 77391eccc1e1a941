"""The selection of a step's batch in Triton: the fields of the expected batch, and correct column constants."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_cases import DEVICE
from iisan_fast.kernels.gpu.batch_selection import SelectBatch
from iisan_fast.kernels.gpu.launch import launches
from iisan_fast.kernels.types import HEADER, StepBatch, StepShape

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
ITEMS = 90


def make_window(shape: StepShape, counts: list[int]) -> torch.Tensor:
    """Return a window of random batches with these numbers of distinct items, each item there one to three times."""
    generator = torch.Generator().manual_seed(1)
    window = torch.randint(-5, 100, (len(counts), shape.starts()[-1]), generator=generator, dtype=torch.int32)
    for words, count in zip(window, counts):
        batch = StepBatch.of(words, shape)
        batch.header[HEADER.index("distinct")] = count
        batch.distinct.zero_()
        batch.distinct[:count] = torch.randperm(ITEMS, generator=generator)[:count].sort().values + 1
        ends = torch.randint(1, 4, (count,), generator=generator).cumsum(0)
        batch.offsets[0] = 0
        batch.offsets[1:] = ends[-1]
        batch.offsets[1 : count + 1] = ends
    return window.to(DEVICE)


@pytest.mark.parametrize("shape", [StepShape(3, 32, 2, 16, 10), StepShape(40, 64, 30, 32, 20)])
def test_the_counter_selects_a_batch_and_its_columns(shape):
    counts = [shape.distinct, 1, 29]
    window = make_window(shape, counts)
    popularity = torch.rand(ITEMS + 1, device=DEVICE).log2()
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    buffer = torch.empty(shape.starts()[-1], dtype=torch.int32, device=DEVICE)
    select = SelectBatch(window, counter, buffer, shape, popularity)
    launches.clear()
    for index in (2, 0, 1, 2):
        counter.fill_(index)
        select.forward()
        expected = StepBatch.of(window[index], shape)
        count = counts[index]
        for name, field in select.batch._asdict().items():
            assert torch.equal(field, getattr(expected, name)), name
        logs = popularity[expected.distinct[:count].long()]
        multiplicity = expected.offsets.diff()[:count].float()
        torch.testing.assert_close(select.column_bias[:count], multiplicity.log2() - logs)
        assert (select.column_bias[count:] == -torch.inf).all()
        assert torch.equal(select.column_log2_popularity[:count], logs)
        assert not select.column_log2_popularity[count:].any()
    assert launches == {"select_batch": 4}


def test_a_window_of_another_shape_is_refused():
    shape = StepShape(3, 32, 2, 16, 10)
    window = make_window(shape, [3])
    counter = torch.zeros(1, dtype=torch.int32)
    buffer = torch.empty(window.shape[1] + 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="window: expected batches of"):
        SelectBatch(window, counter, buffer, shape, torch.zeros(ITEMS + 1))
