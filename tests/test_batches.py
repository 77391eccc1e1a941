"""Batches: what they hold, and an order that depends on seed and epoch alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import make_sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from iisan_fast.batches import epoch_batches, make_batch, steps_per_epoch
from iisan_fast.kernels.reference import unpack_bits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=11), min_size=1, max_size=6))
def test_batch_holds_every_row_once(training):
    sequences = make_sequences([[*history, 1, 1] for history in training], items=40)
    batch = make_batch(sequences, np.arange(len(training)), step=5)
    slots = [item for history in training for item in history]
    assert batch.distinct.tolist() == sorted(set(slots))
    assert batch.multiplicity.tolist() == [slots.count(item) for item in sorted(set(slots))]
    expected = [
        (user, history[: i + 1], history[i + 1])
        for user, history in enumerate(training)
        for i in range(len(history) - 1)
    ]
    found, seen = [], {}
    for slot, user, item, target in zip(
        *(x.tolist() for x in (batch.row_slots, batch.row_users, batch.inputs, batch.targets))
    ):
        assert slot // batch.length == user
        seen[user] = [*seen.get(user, []), batch.distinct[item].item()]
        found.append((user, seen[user], batch.distinct[target].item()))
        inputs = len(training[user]) - 1
        assert slot % batch.length == batch.length - inputs + len(seen[user]) - 1
    assert found == expected
    assert batch.length == max(map(len, training)) - 1
    assert batch.weights.tolist() == [1 / len(expected)] * len(expected)
    own = unpack_bits(batch.history_bits, len(batch.distinct))
    for user, history in enumerate(training):
        assert batch.distinct[own[user]].tolist() == sorted(set(history))


def test_epoch_visits_every_user_once_and_depends_on_seed_and_epoch():
    sequences = make_sequences([[1 + u % 7, 2, 3, 4, 5] for u in range(23)], items=8)

    def order(seed, epoch):
        return [batch.users.tolist() for batch in epoch_batches(sequences, 5, seed, epoch)]

    assert sorted(sum(order(0, 0), [])) == list(range(23))
    assert [len(users) for users in order(0, 0)] == [5, 5, 5, 5, 3] and steps_per_epoch(sequences, 5) == 5
    assert order(0, 3) == order(0, 3)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert [batch.step for batch in epoch_batches(sequences, 5, 0, 2)] == [10, 11, 12, 13, 14]


def test_an_index_out_of_range_is_found_on_the_host():
    batch = make_batch(make_sequences([[1, 2, 3, 9, 9], [4, 1, 9, 9]]), np.arange(2), step=0)
    assert batch.checked(10) is batch
    with pytest.raises(ValueError, match="batch.distinct: expected indices from 1 to 3, found 4"):
        batch.checked(4)
    with pytest.raises(ValueError, match="batch.targets: expected indices from 0 to 3, found 4"):
        dataclasses.replace(batch, targets=batch.targets + 2).checked(10)
