"""Columns of a loss: the batch's items, the whole catalogue, or negatives that a hash draws for each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.datasets import make_sequences
from iisan_fast.data.batches import Batch, epoch_batches, make_batch, padded_shape
from iisan_fast.data.loss_columns import IN_BATCH, Negatives, drawn_items
from iisan_fast.kernels.reference.inbatch_cross_entropy import unpack_bits

SEQUENCES = make_sequences([[1 + u % 7, 2, 3 + u % 5, 40, 5] for u in range(23)], items=70)
FULL = Negatives(catalogue=True)
SAMPLED = Negatives(sampled=9, seed=4)


def items_of(batch: Batch) -> list[tuple[int, int]]:
    """Return the item numbers (input, target) of each row."""
    return list(zip(batch.distinct[batch.inputs].tolist(), batch.distinct[batch.targets].tolist()))


def is_negative(batch: Batch) -> torch.Tensor:
    """Return bool [users, columns]: True where a column is a negative of a user's rows."""
    return ~unpack_bits(batch.history_bits, len(batch.distinct))


@pytest.mark.parametrize("negatives", [FULL, SAMPLED, Negatives(sampled=70, own_mask=False)])
def test_other_columns_change_no_row(negatives):
    for plain, wide in zip(
        epoch_batches(SEQUENCES, 5, 0, 1), epoch_batches(SEQUENCES, 5, 0, 1, negatives=negatives), strict=True
    ):
        assert items_of(wide) == items_of(plain) and wide.slots == plain.slots == int(plain.multiplicity.sum())
        for name in ("users", "row_users", "row_slots", "weights"):
            assert torch.equal(getattr(wide, name), getattr(plain, name))
        assert (wide.step, wide.length) == (plain.step, plain.length)
        assert wide.multiplicity.tolist() == [1] * len(wide.distinct)
        assert (wide.distinct.diff() > 0).all()


def test_a_full_loss_has_the_catalogue_as_columns():
    batch = make_batch(SEQUENCES, np.arange(6), 3, FULL)
    assert batch.distinct.tolist() == list(range(1, 71))
    for user in range(6):
        history = {1 + user % 7, 2, 3 + user % 5}
        assert set(batch.distinct[~is_negative(batch)[user]].tolist()) == history
    assert is_negative(make_batch(SEQUENCES, np.arange(6), 3, Negatives(True, own_mask=False))).all()


@pytest.mark.parametrize("own_mask", [True, False])
def test_a_sampled_loss_has_the_draws_of_its_step_as_negatives(own_mask):
    batch = make_batch(SEQUENCES, np.arange(6), 3, SAMPLED._replace(own_mask=own_mask))
    drawn = set(drawn_items(4, 3, 9, 70).tolist())
    histories = [{1 + user % 7, 2, 3 + user % 5} for user in range(6)]
    assert set(batch.distinct.tolist()) == drawn.union(*histories)
    for user, history in enumerate(histories):
        assert set(batch.distinct[is_negative(batch)[user]].tolist()) == (drawn - history if own_mask else drawn)


def test_without_own_mask_the_batch_has_no_history_bits():
    batch = make_batch(SEQUENCES, np.arange(6), 3, IN_BATCH._replace(own_mask=False))
    assert is_negative(batch).all()
    assert torch.equal(batch.multiplicity, make_batch(SEQUENCES, np.arange(6), 3).multiplicity)


def test_draws_are_distinct_and_depend_on_seed_and_step_alone():
    assert len({tuple(drawn_items(seed, step, 9, 70)) for seed in (0, 1, 2**63 - 1) for step in range(50)}) == 150
    assert drawn_items(0, 0, 3, 70).tolist() == [3, 34, 54]  # they must never change: a run is resumed with them
    assert drawn_items(3, 5, 70, 70).tolist() == list(range(1, 71))
    with pytest.raises(ValueError, match="negatives: expected at most 70, the items of the catalogue, found 71"):
        drawn_items(0, 0, 71, 70)


def mixed(number: int) -> int:
    """Return SplitMix64's output function of a 64-bit number, in Python's integers."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def test_those_of_the_least_hashes_are_drawn():
    for seed, step in ((0, 0), (5, 12), (2**63 - 1, 2**40)):
        prefix = mixed(mixed(seed) ^ step)
        hashes = {item: mixed((prefix + item * 0x9E3779B97F4A7C15) % 2**64) for item in range(1, 71)}
        assert drawn_items(seed, step, 9, 70).tolist() == sorted(sorted(hashes, key=hashes.get)[:9])


def test_items_are_drawn_uniformly_and_independently_of_other_steps():
    steps = 4000
    drawn = np.zeros((steps, 40))
    for step in range(steps):
        drawn[step, drawn_items(1, step, 10, 40) - 1] = 1
    assert np.abs(drawn.mean(0) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / steps)
    correlation = (drawn[1:] - 0.25) * (drawn[:-1] - 0.25)
    assert abs(correlation.mean()) < 5 * 0.25 * 0.75 / np.sqrt(correlation.size)


@pytest.mark.parametrize("negatives", [FULL, SAMPLED])
def test_neither_windows_nor_a_resumed_epoch_change_a_batch(negatives):
    whole = list(epoch_batches(SEQUENCES, 4, 0, 2, negatives=negatives))
    parts = list(epoch_batches(SEQUENCES, 4, 0, 2, 1, taken=2, negatives=negatives))
    assert len(parts) == len(whole) - 2
    for batch, other in zip(whole[2:], parts):
        assert torch.equal(batch.packed(), other.packed())


@pytest.mark.parametrize("negatives", [IN_BATCH, FULL, SAMPLED, Negatives(sampled=70)])
def test_every_batch_fits_the_padded_shape(negatives):
    shape = padded_shape(SEQUENCES, 5, negatives)
    for batch in epoch_batches(SEQUENCES, 5, 0, 0, negatives=negatives):
        assert batch.checked(71).padded(shape).shape == shape
