"""Check reversed training users: plain lists, both splits, batches of both devices, and what does not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.datasets import make_sequences
from iisan_fast.data.batches import epoch_batches, make_batch
from iisan_fast.data.epoch_plan import steps_per_epoch
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.reversed_users import with_reversed_users
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import drop_factors, sequence_dropout

HISTORIES = [[1, 2, 3, 4, 5], [6, 7, 8], [2, 4, 6, 8, 9, 10, 3], [5, 5, 1, 2]]
LEFT_OUT = 2  # interactions that leave-one-out holds out of a history


def leave_one_out() -> Sequences:
    return make_sequences(HISTORIES, items=12)


def temporal() -> Sequences:
    """Return the histories with other ends of training: all of one, none of another."""
    sequences = leave_one_out()
    ends = sequences.offsets[:-1] + np.array([5, 0, 4, 1])
    targets = {"validation": np.array([-1, 5, 12, 16]), "test": np.array([-1, 7, -1, 18])}
    return Sequences(
        sequences.user_ids,
        sequences.item_ids,
        sequences.offsets,
        sequences.items,
        10,
        training_ends=ends,
        targets=targets,
    )


def training_histories(sequences: Sequences) -> list[list[int]]:
    offsets, items = sequences.training
    return [items[start:end].tolist() for start, end in zip(offsets, offsets[1:])]


@pytest.mark.parametrize("make", [leave_one_out, temporal])
def test_each_training_history_comes_once_more_in_reverse(make):
    sequences = make()
    plain = training_histories(sequences)
    both = with_reversed_users(sequences)
    assert training_histories(both) == [*plain, *(history[::-1] for history in plain)]
    assert both.user_ids == 2 * sequences.user_ids and both.item_ids == sequences.item_ids
    users = sequences.training_users.tolist()
    assert both.training_users.tolist() == [*users, *(user + len(HISTORIES) for user in users)]
    assert both.epoch_interactions == 2 * sequences.epoch_interactions
    assert np.array_equal(both.popularity, sequences.popularity)
    for name in ("validation", "test"):
        assert not len(both.split(name).users)


def test_held_out_interactions_are_nowhere_in_training():
    sequences = make_sequences([[1, 2, 3, 11, 12], [4, 5, 6, 12, 11]], items=12)
    assert set(with_reversed_users(sequences).items.tolist()) == {1, 2, 3, 4, 5, 6}


def test_batches_read_reversed_rows_and_users_of_their_own():
    both = with_reversed_users(leave_one_out())
    user = 2 + len(HISTORIES)
    batch = make_batch(both, np.array([user]), 0)
    history = HISTORIES[2][:-LEFT_OUT][::-1]
    assert batch.distinct[batch.inputs].tolist() == history[:-1]
    assert batch.distinct[batch.targets].tolist() == history[1:]
    assert batch.users.tolist() == [user]
    users = torch.tensor([2, user])
    factors = drop_factors(
        sequence_dropout(0.5, 0, 0, users),
        torch.zeros(1, dtype=torch.int64),
        users,
        0 * users,
        torch.arange(64),
        torch.float32,
    )
    assert not torch.equal(*factors[0])


def test_an_epoch_takes_every_user_once_in_both_orders_on_both_devices():
    both = with_reversed_users(leave_one_out())
    users = [user for batch in epoch_batches(both, 3, 0, 1) for user in batch.users.tolist()]
    assert sorted(users) == both.training_users.tolist()
    assert len(users) == 6 and steps_per_epoch(both, 3) == 2  # one user has one training interaction alone
    plan = RunPlan.of(both, 3, 0)
    planned = np.concatenate([window.users for window in plan.windows(1)])
    assert planned.tolist() == users
    sizes = [size for window in plan.windows(1) for size in plan.pack(window).sizes]
    assert sum(size.slots for size in sizes) == both.epoch_interactions
