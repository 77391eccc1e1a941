"""The epoch plan: batches laid out together are those that plain loops make one by one, in windows of any size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from iisan_fast.data.batches import Batch, epoch_batches
from iisan_fast.data.epoch_plan import epoch_windows, steps_per_epoch
from iisan_fast.data.sequences import Sequences

ITEMS = 90
histories = st.lists(st.lists(st.integers(1, ITEMS), min_size=0, max_size=11), min_size=1, max_size=12)


def sequences_of(training: list[list[int]]) -> Sequences:
    """Return users with these training histories."""
    return make_sequences([[*history, 1, 1] for history in training], items=ITEMS)


def plain_batch(histories: list[list[int]], users: list[int], step: int) -> Batch:
    """Return a batch of users' histories, made slot by slot."""
    items = sorted({item for history in histories for item in history})
    length = max(map(len, histories)) - 1
    fields = {name: [] for name in ("inputs", "targets", "row_users", "row_slots")}
    bits = np.zeros((len(users), -(-len(items) // 32)), dtype=np.uint32)
    for user, history in enumerate(histories):
        for position, item in enumerate(history):
            index = items.index(item)
            bits[user, index // 32] |= np.uint32(1 << index % 32)
            if position + 1 < len(history):
                fields["inputs"].append(index)
                fields["targets"].append(items.index(history[position + 1]))
                fields["row_users"].append(user)
                fields["row_slots"].append(user * length + length - (len(history) - 1) + position)
    rows = len(fields["inputs"])
    slots = [item for history in histories for item in history]
    return Batch(
        step=step,
        length=length,
        users=torch.tensor(users),
        distinct=torch.tensor(items),
        multiplicity=torch.tensor([slots.count(item) for item in items]),
        **{name: torch.tensor(values) for name, values in fields.items()},
        weights=torch.full((rows,), 1 / rows, dtype=torch.float64),
        history_bits=torch.from_numpy(bits.view(np.int32)),
    )


def assert_equal(batch: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        value, other = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            assert value.dtype == other.dtype and value.is_contiguous(), field.name
            assert torch.equal(value, other), field.name
        else:
            assert value == other, field.name


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(1, 5), st.integers(1, 4))
def test_batches_are_those_of_plain_loops_in_windows_of_any_size(training, batch_users, window_batches):
    sequences = sequences_of(training)
    training_users = [user for user, history in enumerate(training) if len(history) >= 2]
    order = np.random.default_rng((3, 2)).permutation(training_users) if training_users else []
    batches = list(epoch_batches(sequences, batch_users, seed=3, epoch=2, window_batches=window_batches))
    assert len(batches) == steps_per_epoch(sequences, batch_users) == -(-len(order) // batch_users)
    for index, batch in enumerate(batches):
        users = [int(user) for user in order[index * batch_users : (index + 1) * batch_users]]
        assert_equal(batch, plain_batch([training[user] for user in users], users, 2 * len(batches) + index))


@pytest.mark.parametrize("batches", [1, 3, 4, 20])
@pytest.mark.parametrize("first_batches", [None, 1, 5])
def test_windows_follow_one_another_to_the_end_of_the_epoch(batches, first_batches):
    sequences = sequences_of([[1, 2, 3]] * 23)
    windows = list(epoch_windows(sequences, 2, seed=1, epoch=3, batches=batches, first_batches=first_batches))
    users = np.concatenate([window.users for window in windows])
    assert np.array_equal(users, np.random.default_rng((1, 3)).permutation(23))
    steps = np.cumsum([36, *(-(-len(window.users) // 2) for window in windows)])
    assert steps[-1] == 48 and [window.first_step for window in windows] == steps[:-1].tolist()
    assert len(windows[0].users) <= 2 * min(batches, first_batches or batches)
    assert all(len(window.users) == 2 * batches for window in windows[1:-1])


@pytest.mark.parametrize("taken", [0, 1, 5, 11, 12])
def test_an_epoch_that_goes_on_has_the_batches_that_are_left(taken):
    sequences = sequences_of([[1, 2, 3], [4, 5], [2, 2, 6, 1]] * 8)
    whole = list(epoch_batches(sequences, 2, seed=1, epoch=3))
    rest = list(epoch_batches(sequences, 2, seed=1, epoch=3, window_batches=4, taken=taken))
    assert [batch.step for batch in rest] == list(range(36 + taken, 48))
    for batch, expected in zip(rest, whole[taken:], strict=True):
        assert_equal(batch, expected)


def test_a_real_epoch_has_the_batches_of_plain_loops(scientific):
    offsets, items = scientific.training
    for index, batch in enumerate(epoch_batches(scientific, 64, seed=0, epoch=1)):
        if index % 40 in (0, 28):  # the last one is smaller
            users = batch.users.tolist()
            training = [items[offsets[user] : offsets[user + 1]].tolist() for user in users]
            assert_equal(batch, plain_batch(training, users, 189 + index))
    assert index == 188 and len(users) == 12076 % 64
