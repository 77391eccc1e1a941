"""The loops that pack a batch for the GPU's tests, on a batch small enough to read."""

from __future__ import annotations

from helpers.step_batches import pack_batch, step_shape
from iisan_fast.kernels.types import HEADER, StepBatch

HISTORIES = [[50, 60, 70], list(range(1, 16)), [50, 50]]  # 2, 14 and 1 rows: the last user's row starts a new tile


def test_a_batch_of_three_users():
    shape = step_shape(HISTORIES, positions=20, spare=(1, 1, 1))
    assert shape[:] == (4, 64, 3, 16, 20, 1)
    batch = StepBatch.of(pack_batch(HISTORIES, shape, users=[7, 9, 8], step=3, prefix=2**32 - 5), shape)
    counts = dict(zip(HEADER, batch.header.tolist()))
    assert counts == dict(distinct=18, rows=17, tiles=2, users=3, step=3, prefix=-5, occurrences=20)
    assert batch.users.tolist() == [7, 9, 8, -1]
    assert batch.inputs.tolist() == [15, 16, *range(14), 15] + [-1] * 31
    assert batch.targets.tolist() == [16, 17, *range(1, 15), 15] + [0] * 31
    assert batch.row_users.tolist() == [0, 0] + [1] * 14 + [2] + [4] * 31
    assert batch.positions.tolist() == [18, 19, *range(6, 20), 19] + [0] * 31
    first, last = batch.offsets[15:17].tolist()
    assert batch.occurrences[first:last].tolist() == [4 * 0 + 1, 4 * 16 + 1, 4 * 17 + 2]
    assert batch.offsets[18:].unique().tolist() == [20]
    assert batch.history_bits[0].tolist() == [7 << 15, (1 << 15) - 1, 1 << 15, 0, 0]
