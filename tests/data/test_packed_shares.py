"""Packed batches of several ranks: word by word what plain loops pack, and together the batch of one rank."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from helpers.step_batches import pack_batch
from iisan_fast.data.batches import make_batch
from iisan_fast.data.packed_batches import PackedWindow, RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels.reference.dropout import sequence_dropout
from iisan_fast.kernels.types import HEADER, StepBatch
from iisan_fast.ranks import Ranks

ITEMS = 40
SEED = 7

histories = st.lists(st.lists(st.integers(1, ITEMS), min_size=2, max_size=11), min_size=1, max_size=12)
counts = st.integers(2, 4)


def sequences_of(training: list[list[int]]) -> Sequences:
    return make_sequences([[*history, 1, 1] for history in training], ITEMS, 10)


def shares(sequences: Sequences, batch_users: int, count: int, own_mask: bool = True) -> list[list[StepBatch]]:
    """Return the batches of an epoch as each rank packs them, in windows of two."""
    by_rank = []
    for rank in range(count):
        plan, packed = packed_by(sequences, batch_users, Ranks(rank, count), own_mask)
        words = torch.cat([window.words for window in packed])
        by_rank.append([StepBatch.of(line, plan.shape) for line in words])
    return by_rank


def packed_by(
    sequences: Sequences, batch_users: int, ranks: Ranks, own_mask: bool = True
) -> tuple[RunPlan, list[PackedWindow]]:
    """Return a rank's plan and the windows of an epoch."""
    plan = RunPlan.of(sequences, batch_users, SEED, own_mask, ranks)
    windows = RunPlan(sequences, batch_users, SEED, plan.shape, 2, 2, own_mask, ranks).windows(0)
    return plan, [plan.pack(window) for window in windows]


def field(batch: StepBatch, name: str) -> int:
    return batch.header[HEADER.index(name)].item()


@settings(max_examples=20, deadline=None)
@given(histories, st.integers(1, 6), counts)
def test_shares_are_word_by_word_those_of_plain_loops(training, batch_users, count):
    sequences = sequences_of(training)
    order = np.random.default_rng((SEED, 0)).permutation(len(training))
    for rank in range(count):
        plan, windows = packed_by(sequences, batch_users, Ranks(rank, count))
        lines = torch.cat([window.words for window in windows])
        items = [encoded for window in windows for encoded in window.items]
        for step, words in enumerate(lines):
            users = order[step * batch_users : (step + 1) * batch_users].tolist()
            taken = users[len(users) * rank // count : len(users) * (rank + 1) // count]
            whole, part = ([training[user] for user in chosen] for chosen in (users, taken))
            prefix = sequence_dropout(0.5, SEED, step, torch.tensor(users)).prefix
            assert torch.equal(words, pack_batch(part, plan.shape, taken, step, prefix, whole, rank))
            batch = StepBatch.of(words, plan.shape)
            encoded = batch.encoded[: batch.encoded_count]
            assert torch.equal(items[step], (encoded if len(encoded) else batch.distinct[:1]).long())


@settings(max_examples=20, deadline=None)
@given(histories, st.integers(1, 6), counts, st.booleans())
def test_each_row_stands_on_one_rank_and_the_columns_on_all(training, batch_users, count, own_mask):
    sequences = sequences_of(training)
    order = np.random.default_rng((SEED, 0)).permutation(len(training))
    by_rank = shares(sequences, batch_users, count, own_mask)
    for step, batches in enumerate(zip(*by_rank, strict=True)):
        users = order[step * batch_users : (step + 1) * batch_users]
        whole = make_batch(sequences, users, step)
        rows = Counter()
        encoded = []
        for batch in batches:
            distinct = field(batch, "distinct")
            assert torch.equal(batch.distinct[:distinct].long(), whole.distinct)
            multiplicity = batch.whole_offsets.diff()[:distinct].long()
            assert torch.equal(multiplicity, whole.multiplicity)
            assert field(batch, "rows") == len(whole.targets) == round(1 / whole.weights[0].item())
            real = (batch.inputs >= 0).nonzero()[:, 0].tolist()
            rows.update(
                (batch.users[batch.row_users[row]].item(), batch.inputs[row].item(), batch.targets[row].item())
                for row in real
            )
            bits = batch.history_bits[:, : field(batch, "users")]
            assert bits.any(0).tolist() == [own_mask] * field(batch, "users")
            if own_mask:
                places = [users.tolist().index(user) for user in batch.users[: field(batch, "users")]]
                assert torch.equal(bits.T[:, : whole.shape.words], whole.history_bits[places])
            encoded += batch.encoded[: batch.encoded_count].tolist()
        expected = zip(whole.users[whole.row_users].tolist(), whole.inputs.tolist(), whole.targets.tolist())
        assert rows == Counter(expected)
        assert sorted(encoded) == whole.distinct.tolist()
        sizes = [batch.encoded_count.item() for batch in batches]
        assert max(sizes) - min(sizes) <= 1


def test_all_ranks_have_one_shape_that_is_smaller_than_the_whole_batchs(scientific):
    plans = [RunPlan.of(scientific, 64, SEED, ranks=Ranks(rank, 3)) for rank in range(3)]
    whole = RunPlan.of(scientific, 64, SEED).shape
    assert len({plan.shape for plan in plans}) == 1
    shape = plans[0].shape
    assert (shape.users, shape.distinct, shape.encoded) == (22, whole.distinct, 256)
    assert shape.tiles < whole.tiles and whole.encoded == whole.distinct == 704
    packed = plans[2].pack(next(plans[2].windows(0)))
    sizes = RunPlan.of(scientific, 64, SEED).pack(next(plans[2].windows(0))).sizes
    assert packed.sizes == sizes[: len(packed.sizes)]  # of the whole batch


@pytest.mark.parametrize("count", [2, 3])
def test_one_user_leaves_the_other_ranks_without_rows(count):
    by_rank = shares(sequences_of([[1, 2, 3]]), 4, count)
    for rank, (batch,) in enumerate(by_rank):
        has_user = rank == count - 1
        assert (field(batch, "users"), field(batch, "tiles")) == (has_user, has_user)
        assert field(batch, "rows") == 2 and batch.encoded_count.item() == (3 - rank + count - 1) // count
