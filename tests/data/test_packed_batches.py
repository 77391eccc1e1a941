"""Packed windows: word by word what plain loops pack, in one shape that no batch of a run passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from helpers.step_batches import pack_batch
from iisan_fast.data.epoch_plan import epoch_windows, lay_out
from iisan_fast.data.packed_batches import WINDOW_BYTES, pack_window, step_shape, window_batches
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels.reference.dropout import sequence_dropout
from iisan_fast.kernels.types import HEADER, StepBatch, StepShape

ITEMS = 90


def sequences_of(training: list[list[int]], max_inputs: int = 10) -> Sequences:
    """Return users with these training histories."""
    return make_sequences([[*history, 1, 1] for history in training], ITEMS, max_inputs)


def packed_windows(
    sequences: Sequences, batch_users: int, shape: StepShape, epoch: int = 1, batches: int = 3, first: int | None = None
) -> np.ndarray:
    """Return all windows of an epoch, one after the other."""
    windows = []
    for users, step in epoch_windows(sequences, batch_users, 7, epoch, batches, first):
        layout = lay_out(sequences, users, batch_users)
        windows.append(np.full((layout.batches, shape.starts()[-1]), -77, dtype=np.int32))
        pack_window(layout, shape, step, seed=7, out=windows[-1])
    return np.concatenate(windows)


histories = st.lists(st.lists(st.integers(1, ITEMS), min_size=2, max_size=11), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(1, 6), st.integers(1, 4), st.sampled_from([None, 32, 64]))
def test_windows_are_word_by_word_those_of_plain_loops(training, batch_users, batches, tile_rows):
    sequences = sequences_of(training)
    shape = step_shape(sequences, batch_users, tile_rows)
    assert shape.tile_rows == (tile_rows or 16) and shape.positions == 10
    window = packed_windows(sequences, batch_users, shape, batches=batches)
    order = np.random.default_rng((7, 1)).permutation(len(training))
    steps = -(-len(training) // batch_users)
    assert len(window) == steps
    for index, words in enumerate(torch.from_numpy(window)):
        users = order[index * batch_users : (index + 1) * batch_users].tolist()
        step = steps + index
        prefix = sequence_dropout(0.5, 7, step, torch.tensor(users)).prefix
        expected = pack_batch([training[user] for user in users], shape, users, step, prefix)
        for name, field in StepBatch.of(words, shape)._asdict().items():
            assert torch.equal(field, getattr(StepBatch.of(expected, shape), name)), name
        assert torch.equal(words, expected)


def test_windows_of_any_size_hold_the_same_batches():
    rng = np.random.default_rng(0)
    sequences = sequences_of([rng.integers(1, ITEMS + 1, size).tolist() for size in rng.integers(2, 12, 50)])
    shape = step_shape(sequences, 4)
    whole = packed_windows(sequences, 4, shape, batches=20)
    assert len(whole) == 13
    for batches, first in ((1, None), (5, None), (20, 2), (6, 1)):
        assert np.array_equal(packed_windows(sequences, 4, shape, batches=batches, first=first), whole)


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(1, 6), st.sampled_from([16, 32, 64]))
def test_no_batch_passes_the_shape_and_the_shape_is_tight_where_it_can_be(training, batch_users, tile_rows):
    sequences = sequences_of(training)
    shape = step_shape(sequences, batch_users, tile_rows)
    longest = sorted(map(len, training))[-batch_users:]
    assert shape.users == len(longest) and shape.distinct % 32 == 0
    assert shape.distinct - 32 < min(sum(longest), ITEMS) <= shape.distinct
    assert 1 <= shape.tiles <= len(longest)
    for users in (np.argsort([len(history) for history in training])[-batch_users:], np.arange(len(training))):
        layout = lay_out(sequences, users[: shape.users], shape.users)
        pack_window(layout, shape, 0, 0, np.empty((layout.batches, shape.starts()[-1]), dtype=np.int32))


@pytest.mark.parametrize(
    ("max_inputs", "batch_users", "tile_rows"),
    [(10, 64, 16), (16, 512, 16), (17, 64, 32), (10, 513, 32), (32, 513, 32), (33, 64, 64), (64, 513, 64)],
)
def test_tiles_hold_the_longest_history(max_inputs, batch_users, tile_rows):
    shape = step_shape(sequences_of([[1, 2, 3]], max_inputs), batch_users)
    assert (shape.tile_rows, shape.positions, shape.users) == (tile_rows, max_inputs, 1)


def test_histories_too_long_for_a_tile_are_not_packed():
    assert step_shape(sequences_of([[1, 2, 3]], 65), 64) is None
    assert step_shape(sequences_of([[1] * 66], 10), 64) is None
    assert step_shape(sequences_of([[1, 2, 3]], 17), 64, tile_rows=16) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 2}, "batch.users: expected at most 2, found 3"),
        ({"distinct": 32}, "batch.distinct: expected at most 32, found 40"),
        ({"tiles": 2}, "batch.tiles: expected at most 2, found 3"),
        ({"positions": 11}, "batch.positions: expected at most 11, found 14"),
    ],
)
def test_a_batch_that_passes_the_shape_is_refused(change, message):
    sequences = sequences_of([[*range(1, 16)], [*range(16, 31)], [*range(31, 41)]], max_inputs=16)
    shape = step_shape(sequences, 3)
    assert shape == StepShape(3, 64, 3, 16, 16)
    layout = lay_out(sequences, np.arange(3), 3)
    small = shape._replace(**change)
    with pytest.raises(ValueError) as error:
        pack_window(layout, small, 0, 0, np.empty((1, small.starts()[-1]), dtype=np.int32))
    assert str(error.value) == message


def test_a_step_number_that_no_header_holds_is_refused():
    sequences = sequences_of([[1, 2, 3]])
    shape = step_shape(sequences, 1)
    out = np.empty((1, shape.starts()[-1]), dtype=np.int32)
    pack_window(lay_out(sequences, np.arange(1), 1), shape, 2**31 - 2, 0, out)
    assert out[0, HEADER.index("step")] == 2**31 - 2
    with pytest.raises(ValueError, match="batch.step: expected at most 2147483646, found 2147483647"):
        pack_window(lay_out(sequences, np.arange(1), 1), shape, 2**31 - 1, 0, out)


def test_a_window_takes_at_most_64_megabytes():
    shape = StepShape(64, 704, 64, 16, 10)
    size = 4 * shape.starts()[-1]
    assert window_batches(shape) * size <= WINDOW_BYTES < (window_batches(shape) + 1) * size
    assert window_batches(StepShape(65536, 20320, 9000, 32, 10)) == 1


def test_one_shape_holds_ten_real_epochs(scientific):
    shape = step_shape(scientific, 64)
    assert shape == StepShape(users=64, distinct=704, tiles=64, tile_rows=16, positions=10)
    for epoch in range(10):
        window = packed_windows(scientific, 64, shape, epoch, batches=window_batches(shape))
        header = dict(zip(HEADER, window[:, : len(HEADER)].T))
        assert len(window) == 189 and (header["rows"] == header["occurrences"] - header["users"]).all()
        assert header["rows"].sum() == scientific.epoch_interactions - 12076
        assert header["distinct"].max() <= 400 and header["tiles"].max() <= 32  # far below the bounds
