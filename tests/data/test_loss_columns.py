"""Columns of a loss: the batch's items, all items of training, or negatives that a hash draws for each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.datasets import make_sequences
from iisan_fast.data.batches import Batch, epoch_batches, make_batch, padded_shape
from iisan_fast.data.loss_columns import IN_BATCH, Negatives, drawn_places, possible_negatives
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.kernels.reference.inbatch_cross_entropy import unpack_bits
from iisan_fast.kernels.types import StepBatch

RANDOM = np.random.default_rng(0)
HISTORIES = [RANDOM.integers(1, 61, RANDOM.integers(2, 7)).tolist() for _ in range(23)]  # those of training
SEQUENCES = make_sequences([[*history, 65, 70] for history in HISTORIES], items=70)
TRAINED = sorted(set(sum(HISTORIES, [])))
FULL = Negatives(catalogue=True)
SAMPLED = Negatives(sampled=9, seed=4)
ALL_SAMPLED = Negatives(sampled=len(TRAINED))
USERS = np.array([5, 2, 20, 11])


def numbers_of(batch: Batch) -> list[tuple[int, int]]:
    """Return the item numbers (input, target) of each row."""
    return list(zip(batch.distinct[batch.inputs].tolist(), batch.distinct[batch.targets].tolist()))


def negatives_of(batch: Batch, user: int) -> set[int]:
    """Return the numbers of the items that are negatives of a user's rows."""
    return set(batch.distinct[~unpack_bits(batch.history_bits, len(batch.distinct))[user]].tolist())


@pytest.mark.parametrize("negatives", [FULL, SAMPLED, ALL_SAMPLED._replace(own_mask=False)])
def test_other_columns_change_no_row(negatives):
    for plain, wide in zip(
        epoch_batches(SEQUENCES, 5, 0, 1), epoch_batches(SEQUENCES, 5, 0, 1, negatives=negatives), strict=True
    ):
        assert numbers_of(wide) == numbers_of(plain) and wide.slots == plain.slots == int(plain.multiplicity.sum())
        for name in ("users", "row_users", "row_slots", "weights"):
            assert torch.equal(getattr(wide, name), getattr(plain, name))
        assert (wide.step, wide.length) == (plain.step, plain.length)
        assert wide.multiplicity.tolist() == [1] * len(wide.distinct)
        assert (wide.distinct.diff() > 0).all()


@pytest.mark.parametrize("negatives", [FULL, ALL_SAMPLED])
def test_a_full_loss_has_all_items_of_training_as_columns(negatives):
    assert possible_negatives(SEQUENCES).tolist() == TRAINED and len(TRAINED) < 70
    batch = make_batch(SEQUENCES, USERS, 3, negatives)
    assert batch.distinct.tolist() == TRAINED
    without_mask = make_batch(SEQUENCES, USERS, 3, negatives._replace(own_mask=False))
    for index, user in enumerate(USERS):
        assert negatives_of(batch, index) == {*TRAINED} - {*HISTORIES[user]}
        assert negatives_of(without_mask, index) == {*TRAINED}


@pytest.mark.parametrize("own_mask", [True, False])
def test_a_sampled_loss_has_the_draws_of_its_step_as_negatives(own_mask):
    batch = make_batch(SEQUENCES, USERS, 3, SAMPLED._replace(own_mask=own_mask))
    drawn = {TRAINED[place] for place in drawn_places(4, 3, 9, len(TRAINED))}
    assert set(batch.distinct.tolist()) == drawn.union(*(HISTORIES[user] for user in USERS))
    for index, user in enumerate(USERS):
        assert negatives_of(batch, index) == (drawn - {*HISTORIES[user]} if own_mask else drawn)


def test_without_own_mask_no_bit_of_a_history_is_set():
    batch = make_batch(SEQUENCES, USERS, 3, IN_BATCH._replace(own_mask=False))
    plain = make_batch(SEQUENCES, USERS, 3)
    assert not batch.history_bits.any() and plain.history_bits.any()
    assert torch.equal(batch.multiplicity, plain.multiplicity) and torch.equal(batch.distinct, plain.distinct)


def test_packed_batches_have_no_bit_of_a_history_without_own_mask():
    for own_mask in (True, False):
        plan = RunPlan.of(SEQUENCES, 4, 0, own_mask)
        words = plan.pack(next(plan.windows(0))).words
        assert bool(StepBatch.of(words[0], plan.shape).history_bits.any()) is own_mask
        if own_mask:
            bits = words
    changed = (bits != words).nonzero()[:, 1]
    assert changed.min() >= plan.shape.starts()[-2]  # history bits are the last field


def mixed(number: int) -> int:
    """Return SplitMix64's output function of a 64-bit number, in Python's integers."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def test_the_numbers_of_the_least_hashes_are_drawn():
    for seed, step in ((0, 0), (5, 12), (2**63 - 1, 2**40)):
        prefix = mixed(mixed(seed) ^ step)
        hashes = [mixed((prefix + number * 0x9E3779B97F4A7C15) % 2**64) for number in range(1, 71)]
        assert drawn_places(seed, step, 9, 70).tolist() == sorted(sorted(range(70), key=hashes.__getitem__)[:9])
    assert drawn_places(0, 0, 3, 70).tolist() == [2, 33, 53]  # a run that goes on must draw the same
    assert drawn_places(3, 5, 70, 70).tolist() == list(range(70))
    with pytest.raises(ValueError, match="negatives: expected at most 70, the items that occur in training, found 71"):
        drawn_places(0, 0, 71, 70)


def test_draws_are_distinct_uniform_and_independent_of_other_steps():
    assert len({tuple(drawn_places(seed, step, 9, 70)) for seed in (0, 1, 2**63 - 1) for step in range(50)}) == 150
    steps = 4000
    drawn = np.zeros((steps, 40))
    for step in range(steps):
        drawn[step, drawn_places(1, step, 10, 40)] = 1
    assert np.abs(drawn.mean(0) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / steps)
    products = (drawn[1:] - 0.25) * (drawn[:-1] - 0.25)
    assert abs(products.mean()) < 5 * 0.25 * 0.75 / np.sqrt(products.size)


@pytest.mark.parametrize("negatives", [FULL, SAMPLED])
def test_neither_windows_nor_a_resumed_epoch_change_a_batch(negatives):
    whole = list(epoch_batches(SEQUENCES, 4, 0, 2, negatives=negatives))
    parts = list(epoch_batches(SEQUENCES, 4, 0, 2, 1, taken=2, negatives=negatives))
    assert len(parts) == len(whole) - 2
    for batch, other in zip(whole[2:], parts):
        assert torch.equal(batch.packed(), other.packed())


@pytest.mark.parametrize("negatives", [IN_BATCH, FULL, SAMPLED, ALL_SAMPLED])
def test_every_batch_fits_the_padded_shape(negatives):
    shape = padded_shape(SEQUENCES, 5, negatives)
    for batch in epoch_batches(SEQUENCES, 5, 0, 0, negatives=negatives):
        assert batch.checked(71).padded(shape).shape == shape
