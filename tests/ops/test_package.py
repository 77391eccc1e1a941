"""The reference ops against their literal definitions: loss dense and deduplicated, ranks, towers, and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from iisan_fast import kernels
from iisan_fast.data.batches import make_batch
from iisan_fast.kernels import reference

ROOT = Path(__file__).parents[2]

histories = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=11), min_size=1, max_size=7)


def both_losses(training: list[list[int]], seed: int = 0, d: int = 5) -> tuple[torch.Tensor, torch.Tensor, list]:
    """(deduplicated, dense, leaves) for users' training sequences with random item vectors and queries."""
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
    dense = reference.inbatch_cross_entropy_dense(
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


def test_loss_of_a_user_alone_is_zero():
    deduplicated, _, _ = both_losses([[1, 2, 3]])
    assert deduplicated.item() == 0


def test_loss_by_hand():
    """Two users, one row each: Z holds the target and the other user's two items."""
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


def naive_rank(scores: list[float], target: int, excluded: set[int], tie_share: float) -> float:
    if target in excluded:
        return float("inf")
    others = [score for item, score in enumerate(scores) if item not in excluded and item != target]
    return 1 + sum(s > scores[target] for s in others) + sum(s == scores[target] for s in others) * tie_share


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_target_rank_equals_counting(data):
    users, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    scores = data.draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=count, max_size=count), min_size=users, max_size=users)
    )
    targets = data.draw(st.lists(st.integers(0, count - 1), min_size=users, max_size=users))
    width = data.draw(st.integers(0, 5))
    excluded = data.draw(
        st.lists(st.lists(st.integers(-1, count - 1), min_size=width, max_size=width), min_size=users, max_size=users)
    )
    tie_share = data.draw(st.sampled_from([0.5, 0.0]))
    masked, unmasked = kernels.target_rank(
        torch.tensor(scores, dtype=torch.float64),
        torch.eye(count, dtype=torch.float64),
        torch.tensor(targets),
        torch.tensor(excluded, dtype=torch.int64).reshape(users, width),
        tie_share=tie_share,
        chunk_elements=data.draw(st.integers(1, 40)),
    )
    expected = [naive_rank(s, t, set(x) - {-1}, tie_share) for s, t, x in zip(scores, targets, excluded)]
    assert masked.tolist() == expected
    assert unmasked.tolist() == [naive_rank(s, t, set(), tie_share) for s, t in zip(scores, targets)]


def test_target_rank_of_a_score_that_is_not_finite_is_nan():
    items = torch.tensor([[1.0], [float("nan")], [2.0]])
    ranks = kernels.target_rank(torch.ones(1, 1), items, torch.tensor([0]), torch.full((1, 1), -1))
    assert all(rank.isnan().all() for rank in ranks)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("inter", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_side_tower_gradients(gated, inter, activation):
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    arguments = [leaf(3, 2, 4), leaf(3, 2, 4) if inter else None, leaf(2) if gated else None]
    arguments += [leaf(2, 3, 4), leaf(2, 3), leaf(2, 4, 3), leaf(2, 4)]
    assert torch.autograd.gradcheck(lambda *a: reference.side_tower(*a, activation), arguments)


def test_side_tower_by_hand():
    """One layer of width 1: the gate at 0 halves the input, then x + up * relu(down * x + b) + c."""
    one = torch.ones(1, 1, dtype=torch.float64)
    out = reference.side_tower(
        torch.tensor([[[4.0]]], dtype=torch.float64),
        None,
        torch.zeros(1, dtype=torch.float64),
        3 * one[None],
        5 * one,
        7 * one[None],
        11 * one,
    )
    assert out.item() == 2 + 7 * (3 * 2 + 5) + 11


def test_unpack_bits_reads_what_batches_pack():
    sequences = make_sequences([[*range(1, 41), 1, 1], [40, 3, 1, 1]], max_inputs=60)
    batch = make_batch(sequences, np.arange(2), step=0)
    own = reference.unpack_bits(batch.history_bits, len(batch.distinct))
    assert own[0].all() and own[1].nonzero()[:, 0].tolist() == [2, 39]


FROM_THE_ROOT = """
import transformers
from transformers.utils import is_kernels_available
import kernels
assert not is_kernels_available() and not hasattr(kernels, "side_tower")
try:
    import kernels.reference
except ImportError:
    print("absent")
import iisan_fast.kernels
assert iisan_fast.kernels.side_tower
"""


def test_the_kernels_folder_is_no_package_of_its_own():
    """From the repository root `import kernels` finds our folder; transformers must load and think it absent."""
    result = subprocess.run([sys.executable, "-c", FROM_THE_ROOT], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "absent", result.stderr


def test_a_checkout_is_whole_whatever_is_installed():
    """Python started in the repository root, without the editable install's hooks, finds kernels and cli."""
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}
    script = "import iisan_fast.cli, iisan_fast.kernels; print(iisan_fast.kernels.__file__)"
    command = [sys.executable, "-S", "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), result.stderr


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
    assert torch.autograd.gradcheck(lambda q, e: reference.row_losses(q, e, *arguments), leaves)


def test_side_towers_gradients():
    """Of two towers at once, one over rows of a table, one over both views with the second differentiable."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    table, rows, dense = leaf(4, 2, 3).detach(), torch.tensor([3, 0, 3]), leaf(3, 2, 3)
    shapes = [(2,), (2, 5, 3), (2, 5), (2, 3, 5), (2, 3)]
    leaves = [leaf(*shape) for _ in range(2) for shape in shapes]

    def towers(dense, *parameters):
        states = [kernels.States(table, rows), kernels.States(dense)]
        both = [kernels.Tower((0,), *parameters[:5]), kernels.Tower((0, 1), *parameters[5:])]
        return tuple(kernels.side_towers(states, both))

    assert torch.autograd.gradcheck(towers, (dense, *leaves))
