"""Batches with local negatives: each rank's are those of its own users, weighted so that sums are averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.datasets import histories_at_random, make_sequences
from iisan_fast.data.batches import epoch_batches, make_batch
from iisan_fast.data.rank_batches import batch_slots, local_batches
from iisan_fast.ranks import Ranks

SEQUENCES = make_sequences(histories_at_random(23, 30), 30)  # batches of 9, 9 and 5 users
COUNT = 7


@pytest.mark.parametrize("taken", [0, 2])
def test_each_rank_has_its_own_users_and_their_items_alone(taken):
    whole = list(epoch_batches(SEQUENCES, 9, 3, epoch=1, taken=taken))
    by_rank = [list(local_batches(SEQUENCES, 9, 3, 1, Ranks(rank, COUNT), taken)) for rank in range(COUNT)]
    for batch, *parts in zip(whole, *by_rank, strict=True):
        trained = [part for part in parts if part.weights.sum() > 0]
        assert torch.equal(torch.cat([part.users for part in trained]), batch.users)
        assert len(trained) == min(COUNT, len(batch.users))
        for part in trained:
            alone = make_batch(SEQUENCES, part.users.numpy(), batch.step)
            assert torch.equal(part.distinct, alone.distinct) and torch.equal(part.multiplicity, alone.multiplicity)
            assert torch.equal(part.history_bits, alone.history_bits) and part.step == batch.step
            rows = len(part.targets)
            np.testing.assert_allclose(part.weights, np.full(rows, 1 / (rows * len(trained))), rtol=1e-12)
    assert list(batch_slots(SEQUENCES, 9, 3, 1, taken)) == [batch.slots for batch in whole]
