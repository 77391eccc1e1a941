"""Batches: what they hold, an order that depends on seed and epoch alone, padding, and one buffer for all of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, Shape, epoch_batches, make_batch, padded_shape
from iisan_fast.data.epoch_plan import steps_per_epoch
from iisan_fast.kernels.reference.inbatch_cross_entropy import unpack_bits


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
    rows = []
    seen = {}
    for slot, user, item, target in zip(
        *(x.tolist() for x in (batch.row_slots, batch.row_users, batch.inputs, batch.targets))
    ):
        assert slot // batch.length == user
        seen[user] = [*seen.get(user, []), batch.distinct[item].item()]
        rows.append((user, seen[user], batch.distinct[target].item()))
        inputs = len(training[user]) - 1
        assert slot % batch.length == batch.length - inputs + len(seen[user]) - 1
    assert rows == expected
    assert batch.length == max(map(len, training)) - 1
    assert batch.weights.tolist() == [1 / len(expected)] * len(expected)
    has_item = unpack_bits(batch.history_bits, len(batch.distinct))
    for user, history in enumerate(training):
        assert batch.distinct[has_item[user]].tolist() == sorted(set(history))


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


# Padded to one shape


histories = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=11), min_size=1, max_size=6)
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name not in ("buffer", "block")]


def batch_of(training: list[list[int]], step: int = 5) -> Batch:
    """Return the batch of users with these training histories."""
    return make_batch(
        make_sequences([[*history, 1, 1] for history in training], items=40), np.arange(len(training)), step
    )


def shape_of(training: list[list[int]]) -> Shape:
    """Return the shape to which a run pads the batch of these users."""
    return padded_shape(make_sequences([[*history, 1, 1] for history in training], items=40), len(training))


@settings(max_examples=40, deadline=None)
@given(histories, st.tuples(st.integers(1, 4), st.integers(0, 70), st.integers(0, 9), st.integers(0, 3)))
def test_a_padded_batch_holds_the_batch_and_nothing_that_counts(training, extra):
    batch = batch_of(training)
    padded = batch.padded(Shape(*(size + more for size, more in zip(batch.shape, extra))))
    users, distinct, rows, length = batch.shape
    assert padded.shape == tuple(size + more for size, more in zip(batch.shape, extra)) and padded.step == batch.step
    for name, count, filler in (
        ("users", users, -1),
        ("distinct", distinct, 0),
        ("multiplicity", distinct, 0),
        ("inputs", rows, 0),
        ("targets", rows, 0),
        ("row_users", rows, padded.shape.users - 1),
        ("row_slots", rows, padded.shape.users * padded.length - 1),
        ("weights", rows, 0),
    ):
        part, whole = getattr(batch, name), getattr(padded, name)
        assert whole.dtype == part.dtype
        assert (whole[count:] == filler).all(), name
        assert name == "row_slots" or torch.equal(whole[:count], part), name
    slots = padded.row_slots[:rows]
    assert torch.equal(slots // padded.length, batch.row_users)
    assert torch.equal(padded.length - slots % padded.length, length - batch.row_slots % length)  # from the right
    assert (padded.row_slots.diff() >= 0).all()
    part = unpack_bits(padded.history_bits, padded.shape.distinct)
    assert torch.equal(part[:users, :distinct], unpack_bits(batch.history_bits, distinct))
    assert not part[users:].any() and not part[:, distinct:].any()


@pytest.mark.parametrize("change", [{"users": 2}, {"distinct": 4}, {"rows": 3}, {"length": 2}])
def test_a_shape_too_small_for_a_batch_is_refused(change):
    batch = batch_of([[1, 2, 3, 4], [5, 1]])
    assert batch.shape == Shape(users=2, distinct=5, rows=4, length=3)
    shape = Shape(users=3, distinct=5, rows=4, length=3)
    assert batch.padded(shape).shape == shape
    small = shape._replace(**change)
    with pytest.raises(ValueError) as error:
        batch.padded(small)
    assert str(error.value) == f"batch: {batch.shape} does not fit into {small}"


@settings(max_examples=40, deadline=None)
@given(histories, st.integers(1, 8))
def test_every_batch_of_ten_epochs_is_padded_to_one_shape(training, batch_users):
    sequences = make_sequences([[*history, 1, 1] for history in training], items=40)
    shape = padded_shape(sequences, batch_users)
    longest = sorted(map(len, training))[-batch_users:]
    slots = sum(longest)
    assert shape == (len(longest) + 1, -(-min(slots, 40) // 32) * 32, slots - len(longest), 10)
    for epoch in range(10):
        for batch in epoch_batches(sequences, batch_users, 0, epoch):
            assert batch.padded(shape).shape == shape


def test_every_batch_of_ten_real_epochs_is_padded_to_one_shape(scientific):
    shape = padded_shape(scientific, 64)
    assert shape == Shape(users=65, distinct=704, rows=640, length=10)
    batches = [batch for epoch in range(10) for batch in epoch_batches(scientific, 64, 0, epoch)]
    assert len({batch.shape for batch in batches}) > 100
    assert all(batch.padded(shape).shape == shape for batch in batches[::10])
    assert all(size <= room for batch in batches for size, room in zip(batch.shape, shape))


@settings(max_examples=20, deadline=None)
@given(histories, st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 9), st.integers(0, 2)))
def test_padding_changes_neither_the_loss_nor_a_gradient(training, extra):
    batch = batch_of(training)
    shape = Shape(*(size + more for size, more in zip(batch.shape, extra)))
    sequences = make_sequences([[*history, 1, 1] for history in training], items=40, max_inputs=12)
    popularity = np.maximum(sequences.popularity, 1e-3)
    model = (
        side_recommender([(2, 6)], ModelConfig(embedding_dim=8, bottleneck=4), 12, popularity, seed=1).double().train()
    )
    table = random_table([(2, 6)], 40)
    results = []
    for form in (batch, batch.padded(shape), batch.padded(padded_shape(sequences, len(training)))):
        model.zero_grad()
        loss = model.loss(form, table.read(form.distinct))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for padded in results[1:]:
        torch.testing.assert_close(padded, results[0], rtol=1e-9, atol=1e-12)


# Packed into one buffer


def assert_same_batch(batch: Batch, expected: Batch) -> None:
    for name in FIELDS:
        value, other = getattr(batch, name), getattr(expected, name)
        if isinstance(other, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        else:
            assert value == other, name


@settings(max_examples=40, deadline=None)
@given(histories, st.booleans())
def test_a_packed_batch_comes_back(training, pad):
    batch = batch_of(training, step=2**40)
    batch = batch.padded(shape_of(training)) if pad else batch
    buffer = batch.packed()
    assert buffer.dtype == torch.int64 and buffer.dim() == 1
    unpacked = Batch.unpacked(buffer, batch.shape)
    assert_same_batch(unpacked, batch)
    assert unpacked.shape == batch.shape and unpacked.buffer is buffer
    assert unpacked.step.dtype == torch.int64 and unpacked.step.dim() == 0
    assert_same_batch(Batch.unpacked(unpacked.packed(), batch.shape), batch)  # packed anew


@pytest.mark.parametrize("users", [1, 3])
def test_an_odd_number_of_history_words_is_packed_too(users):
    batch = batch_of([[1, 2, 3]] * users)
    assert batch.history_bits.numel() == users  # half a word of the buffer is left over
    assert_same_batch(Batch.unpacked(batch.packed(), batch.shape), batch)


def test_an_unpacked_batch_is_the_buffer_itself():
    """A graph's batch is replaced by copying another one of its shape into the buffer."""
    first, second = (batch_of(training) for training in ([[1, 2, 3], [4, 5]], [[9, 8, 7], [6, 9]]))
    second = dataclasses.replace(second, step=77, weights=second.weights * 3)
    shape = Shape(4, 64, 64, 10)
    first, second = first.padded(shape), second.padded(shape)
    unpacked = Batch.unpacked(first.packed(), shape)
    changed = [name for name in FIELDS if name != "length" and not _equal(first, second, name)]
    assert {"step", "distinct", "inputs", "targets", "weights"} <= set(changed)
    unpacked.buffer.copy_(second.packed())
    assert_same_batch(unpacked, second)


def _equal(one: Batch, other: Batch, name: str) -> bool:
    return torch.equal(torch.as_tensor(getattr(one, name)), torch.as_tensor(getattr(other, name)))


def test_a_cpu_has_every_batch_already():
    batch = batch_of([[1, 2, 3], [4, 5]])
    assert batch.to(torch.device("cpu")) is batch
