"""The reference of the loss against its literal definitions: dense, by hand, and by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from iisan_fast import kernels
from iisan_fast.data.batches import make_batch
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference

histories = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=11), min_size=1, max_size=7)


def both_losses(training: list[list[int]], seed: int = 0, d: int = 5) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Return (deduplicated loss, dense loss, leaves) for training sequences with random item vectors and queries."""
    sequences = make_sequences([history + [1, 1] for history in training], items=9)
    batch = make_batch(sequences, np.arange(len(training)), step=0)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(10, d, generator=generator, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(len(batch.targets), d, generator=generator, dtype=torch.float64, requires_grad=True)
    log_popularity = torch.rand(10, generator=generator, dtype=torch.float64).log()
    deduplicated = kernels.inbatch_cross_entropy(
        queries,
        vectors[batch.distinct],
        batch.targets,
        batch.row_users,
        batch.history_bits,
        batch.multiplicity.double().log(),
        log_popularity[batch.distinct],
    )
    slot_items = torch.tensor([item for history in training for item in history])
    slot_users = torch.tensor([user for user, history in enumerate(training) for _ in history])
    first_slots = [slot for slot in range(len(slot_users)) if slot == 0 or slot_users[slot] != slot_users[slot - 1]]
    target_slots = torch.tensor([slot for slot in range(len(slot_users)) if slot not in first_slots])
    dense = loss_reference.inbatch_cross_entropy_dense(
        queries, vectors[slot_items], slot_items, slot_users, target_slots, log_popularity[slot_items]
    )
    return deduplicated, dense, [queries, vectors]


def assert_equal_losses(training: list[list[int]], seed: int = 0) -> None:
    deduplicated, dense, leaves = both_losses(training, seed)
    torch.testing.assert_close(deduplicated, dense, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(deduplicated, leaves), torch.autograd.grad(dense, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(0, 3))
def test_deduplicated_loss_equals_dense_loss(training, seed):
    assert_equal_losses(training, seed)


@pytest.mark.parametrize(
    "training",
    [
        [[1, 1, 1], [1, 2]],  # repeated items
        [[1, 2], [3, 4], [5, 6]],  # histories of two items only
        [[1, 2, 3], [4, 1, 5], [6, 7, 1]],  # everyone shares one item
        [[1, 2], [1, 2]],  # the same history twice: every column masked
        [[3, 3]],  # one user, one item
    ],
)
def test_deduplicated_loss_equals_dense_loss_on_corner_cases(training):
    assert_equal_losses(training)


def test_loss_of_a_single_user_is_zero():
    deduplicated, _, _ = both_losses([[1, 2, 3]])
    assert deduplicated.item() == 0


def test_loss_by_hand():
    """Check two users with one row each: Z sums over the target and the other user's two items."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    items = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    bits = torch.tensor([[0b0011], [0b1100]], dtype=torch.int32)
    loss = kernels.inbatch_cross_entropy(
        queries, items, torch.tensor([1, 3]), torch.tensor([0, 1]), bits, torch.zeros(4, dtype=torch.float64), log_p
    )
    e = np.exp
    first = -np.log((e(0) / 0.2) / (e(0) / 0.2 + e(3) / 0.3 + e(0) / 0.4))
    second = -np.log((e(4) / 0.4) / (e(4) / 0.4 + e(0) / 0.1 + e(2) / 0.2))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)


def test_unpack_bits_reads_the_bits_of_batches():
    sequences = make_sequences([[*range(1, 41), 1, 1], [40, 3, 1, 1]], max_inputs=60)
    batch = make_batch(sequences, np.arange(2), step=0)
    in_history = loss_reference.unpack_bits(batch.history_bits, len(batch.distinct))
    assert in_history[0].all() and in_history[1].nonzero()[:, 0].tolist() == [2, 39]


@pytest.mark.parametrize(
    ("masked", "counted", "debiased"), [(True, True, True), (False, True, True), (False, False, False)]
)
def test_loss_gradients(masked, counted, debiased):
    generator = torch.Generator().manual_seed(2)
    queries, items = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    targets, row_users = torch.tensor([0, 1, 1, 4]), torch.tensor([0, 0, 1, 1])
    arguments = (
        targets,
        row_users if masked else None,
        torch.tensor([[0b00011], [0b10110]], dtype=torch.int32) if masked else None,
        torch.tensor([1, 3, 1, 2, 1]).double().log() if counted else None,
        torch.rand(5, generator=generator, dtype=torch.float64).log() if debiased else None,
    )
    leaves = (queries.requires_grad_(), items.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, e: loss_reference.inbatch_cross_entropy(q, e, *arguments), leaves)
