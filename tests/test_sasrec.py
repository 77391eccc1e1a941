"""The sequence encoder: causal, blind to padding and to batching, with dropout that hashes who and where."""

from __future__ import annotations

import pytest
import torch

from iisan_fast.config import ModelConfig
from iisan_fast.sasrec import SASRec, StatelessDropout

CONFIG = ModelConfig(embedding_dim=8, dropout=0.25)


def encoder() -> SASRec:
    torch.manual_seed(0)
    return SASRec(CONFIG, max_inputs=6).double()


def dropout(users, positions=range(6), step=3, seed=1) -> StatelessDropout:
    return StatelessDropout(CONFIG.dropout, seed, step, torch.tensor(users), torch.tensor(list(positions)))


def test_later_items_and_padding_change_nothing():
    model, x = encoder(), torch.randn(2, 6, 8, dtype=torch.float64)
    real = torch.tensor([[False, False, True, True, True, True]] * 2)
    states = model(x, real)
    changed = x.clone()
    changed[:, 5] += 1
    changed[:, :2] += 1
    torch.testing.assert_close(model(changed, real)[:, 2:5], states[:, 2:5], rtol=0, atol=0)
    assert not torch.equal(model(changed, real)[:, 5], states[:, 5])


def test_a_shorter_grid_gives_the_same_states_with_dropout():
    """Right-aligned: dropping columns that are padding for everyone changes neither states nor masks."""
    model, x = encoder(), torch.randn(3, 6, 8, dtype=torch.float64)
    real = torch.tensor([[False, False, True, True, True, True]] * 3)
    whole = model(x, real, dropout([4, 9, 2]))
    short = model(x[:, 2:], real[:, 2:], dropout([4, 9, 2], range(2, 6)))
    torch.testing.assert_close(short, whole[:, 2:], rtol=1e-12, atol=1e-12)


def test_a_users_masks_do_not_depend_on_the_batch():
    model, x = encoder(), torch.randn(3, 6, 8, dtype=torch.float64)
    real = torch.ones(3, 6, dtype=torch.bool)
    together = model(x, real, dropout([4, 9, 2]))
    alone = model(x[1:2], real[1:2], dropout([9]))
    torch.testing.assert_close(alone, together[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("field", ["users", "positions", "step", "seed", "site"])
def test_every_field_changes_the_mask(field):
    changed = {"users": [8], "positions": range(1, 7), "step": 4, "seed": 2}
    ones = torch.ones(1, 6, 64)
    base = dropout([7])(ones, site=1)
    settings = {field: changed[field]} if field in changed else {}
    other = dropout(**{"users": [7], **settings})(ones, site=2 if field == "site" else 1)
    assert 0.2 < (base != other).float().mean() < 0.55  # 2 * 0.25 * 0.75 = 0.375 of independent masks differ


def test_the_share_kept_and_the_mean_are_right():
    dropped = dropout(range(64))(torch.ones(64, 6, 64), site=0)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_no_dropout_leaves_the_input_as_it_is():
    x = torch.randn(1, 6, 8)
    assert StatelessDropout(0.0, 0, 0, torch.tensor([0]), torch.arange(6))(x, 0) is x
