"""The sequence encoder is causal, ignores padding and batching, and its dropout depends on user and position."""

from __future__ import annotations

import pytest
import torch

from iisan_fast.config import ModelConfig
from iisan_fast.kernels import SequenceDropout, SequenceGrid, drop_factors, sequence_dropout
from iisan_fast.kernels.reference.dropout import MASK32, _absorb, _mix
from iisan_fast.kernels.reference.sequence_encoder import _Collect, _on_grid
from iisan_fast.models.sasrec import SASRec

CONFIG = ModelConfig(embedding_dim=8, dropout=0.25)
LENGTHS = (4, 6, 1)


def encoder() -> SASRec:
    torch.manual_seed(0)
    return SASRec(CONFIG, max_inputs=6).double()


def rows(lengths=LENGTHS, length=6) -> SequenceGrid:
    slots = [length * (user + 1) - rows + i for user, rows in enumerate(lengths) for i in range(rows)]
    return SequenceGrid(torch.tensor(slots), len(lengths), length)


def dropout(users, step=3, seed=1) -> SequenceDropout:
    return sequence_dropout(CONFIG.dropout, seed, step, torch.tensor(users))


def vectors(count: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randn(count, 8, dtype=torch.float64)


def test_later_items_and_other_users_change_nothing():
    model = encoder()
    x = vectors()
    states = model(x, rows())
    changed = x.clone()
    changed[3:] += 1  # the first user's last item, and everybody else's
    changed_states = model(changed, rows())
    torch.testing.assert_close(changed_states[:3], states[:3], rtol=0, atol=0)
    assert not torch.equal(changed_states[3], states[3])


def test_a_longer_grid_gives_the_same_states_with_dropout():
    """Histories are right-aligned: columns that are padding for all users change neither states nor masks."""
    model = encoder()
    x = vectors(5)
    short = model(x, rows((4, 1), length=4), dropout([4, 9]))
    torch.testing.assert_close(short, model(x, rows((4, 1), length=6), dropout([4, 9])), rtol=1e-12, atol=1e-12)


def test_a_users_masks_do_not_depend_on_the_batch():
    model = encoder()
    x = vectors()
    together = model(x, rows(), dropout([4, 9, 2]))
    alone = model(x[4:10], rows((6,)), dropout([9]))
    torch.testing.assert_close(alone, together[4:10], rtol=1e-12, atol=1e-12)


def test_rows_on_the_grid_and_off_it_again():
    x = vectors().requires_grad_()
    grid = _on_grid(x, rows())
    assert grid.shape == (3, 6, 8) and not grid[2, :5].any() and torch.equal(grid[0, 2:], x[:4])

    def off_grid(x: torch.Tensor) -> torch.Tensor:
        return _Collect.apply(x.flatten(0, 1), rows().slots)

    assert torch.equal(off_grid(grid), x)
    assert torch.autograd.gradcheck(lambda x: off_grid(_on_grid(x, rows()) ** 2), x)


def factors(users=(7,), positions=range(6), step=3, seed=1, site=1) -> torch.Tensor:
    where = torch.tensor([site]), torch.tensor(users).repeat_interleave(len(positions))
    return drop_factors(
        dropout(users, step, seed), *where, torch.tensor(list(positions) * len(users)), torch.arange(64), torch.float64
    )[0]


@pytest.mark.parametrize("field", ["users", "positions", "step", "seed", "site"])
def test_every_field_changes_the_mask(field):
    changed = {"users": [8], "positions": range(1, 7), "step": 4, "seed": 2, "site": 2}
    other = factors(**{field: changed[field]})
    assert 0.2 < (factors() != other).double().mean() < 0.55  # 2 * 0.25 * 0.75 = 0.375 of independent masks differ


def test_dropout_keeps_the_right_share_and_mean():
    dropped = factors(range(64))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_a_step_number_on_the_device_gives_the_same_masks():
    assert torch.equal(factors(step=torch.tensor(3)), factors(step=3))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63, -5])
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**40 + 7, 2**63 - 1])
def test_a_hash_by_integers_is_that_by_tensors(seed, step):
    by_tensors = _absorb(torch.tensor(_mix(seed & MASK32)), torch.tensor(step))
    users = torch.arange(3)
    assert sequence_dropout(0.1, seed, step, users).prefix == by_tensors
    assert sequence_dropout(0.1, seed, torch.tensor(step), users).prefix == by_tensors


def test_no_dropout_leaves_the_states_as_they_are():
    model = encoder()
    x = vectors()
    assert sequence_dropout(0.0, 0, 0, torch.arange(3)) is None
    assert torch.equal(model(x, rows(), None), model(x, rows()))
