"""Check the vectors that item_ids adds: plain formulas in fp64, masks, cold items, catalogue vectors, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.reference_step import hashed
from helpers.tables import random_table
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.errors import InputError
from iisan_fast.models.item_ids import ITEM_SITE, ItemIds
from iisan_fast.models.recommender import Recommender
from iisan_fast.training.training_step import TrainingStep

CPU = torch.device("cpu")
USERS, ITEMS, COLD = 30, 60, 20  # the last items are targets of validation and test alone
SHAPES = [(2, 6), (2, 6)]
CONFIG = ModelConfig(embedding_dim=8, bottleneck=4, item_ids=True)
SEED = 5


def cold_sequences():
    """Return histories of warm items that end with two cold ones."""
    rng = np.random.default_rng(0)
    warm, cold = np.arange(1, ITEMS - COLD + 1), np.arange(ITEMS - COLD + 1, ITEMS + 1)
    sizes = rng.integers(4, 11, USERS)
    histories = [[*rng.choice(warm, size).tolist(), *rng.choice(cold, 2).tolist()] for size in sizes]
    return make_sequences([warm[:10].tolist() + [1, 1], warm[10:20].tolist() + [1, 1], *histories], items=ITEMS)


SEQUENCES = cold_sequences()
TABLE = random_table(SHAPES, ITEMS)
TRAINED = np.flatnonzero(SEQUENCES.training_counts)


def build(config: ModelConfig = CONFIG) -> Recommender:
    """Return a model in fp64 and training mode, whose added vectors are not 0."""
    model = side_recommender(SHAPES, config, SEQUENCES.max_inputs, SEQUENCES.popularity, SEED)
    model.item_ids = ItemIds(SEQUENCES.popularity, config.embedding_dim, config.item_id_dropout, SEED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.item_ids.weight[1:] = torch.randn(len(TRAINED), 8, generator=generator)
    return model.double().train()


def plain_factors(items: list[int], step: int, probability: float) -> Tensor:
    """Return the dropout's factors by the hash of the tests' own reference."""
    threshold = round(probability * 2**32)
    dropped = [[hashed(SEED, step, ITEM_SITE, item, 0, i) < threshold for i in range(8)] for item in items]
    return (~torch.tensor(dropped)).double() / (1 - probability)


class Constant(nn.Module):
    """Item vectors that do not depend on states."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, states: object) -> Tensor:
        return self.vectors


def batch(users=range(12), step: int = 7) -> Batch:
    return make_batch(SEQUENCES, np.array(users), step)


def test_vectors_begin_at_zero_and_take_no_random_numbers():
    ids = ItemIds(SEQUENCES.popularity, 8, 0.3, SEED)
    assert ids.weight.shape == (len(TRAINED) + 1, 8) and not ids.weight.any()
    without = side_recommender(
        SHAPES, replace(CONFIG, item_ids=False), SEQUENCES.max_inputs, SEQUENCES.popularity, SEED
    )
    weights = dict(build().named_parameters())
    assert all(torch.equal(weights[name], weight.double()) for name, weight in without.named_parameters())


@pytest.mark.parametrize("probability", [0.3, 0.0])
def test_the_loss_is_that_of_content_vectors_plus_dropped_out_vectors(probability):
    model = build(replace(CONFIG, item_id_dropout=probability))
    step_batch = batch()
    items = step_batch.distinct.tolist()
    states = TABLE.read(step_batch.distinct)
    loss = model.loss(step_batch, states)
    loss.backward()
    content = model.item_encoder(states).detach()
    added = torch.stack([model.item_ids.weight[np.searchsorted(TRAINED, item) + 1] for item in items]).detach()
    added.requires_grad_()
    vectors = content + added * plain_factors(items, 7, probability)
    plain = build()
    plain.item_ids = None
    plain.item_encoder = Constant(vectors)
    plain_loss = plain.loss(step_batch, states)
    plain_loss.backward()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-13, atol=0)
    gradient = torch.zeros_like(model.item_ids.weight)
    gradient[np.searchsorted(TRAINED, items) + 1] = added.grad
    torch.testing.assert_close(model.item_ids.weight.grad, gradient, rtol=1e-12, atol=1e-16)
    assert gradient.any()


def test_a_mask_depends_on_seed_step_and_item_alone():
    model = build()
    items = torch.tensor([9, 1, 40, 3])
    factors = model.item_ids.factors(items, 4)
    assert torch.equal(factors, plain_factors(items.tolist(), 4, 0.3).to(factors.dtype))
    assert torch.equal(model.item_ids.factors(items.flip(0), 4), factors.flip(0))
    assert torch.equal(model.item_ids.factors(items, torch.tensor(4)), factors)
    assert not torch.equal(model.item_ids.factors(items, 5), factors)
    assert model.item_ids.factors(torch.arange(1000), 3).eq(0).double().mean() == pytest.approx(0.3, abs=0.02)


def test_padding_and_the_order_of_users_change_no_gradient():
    model = build()
    gradients = []
    shape = padded_shape(SEQUENCES, 20)
    for step_batch in (batch(), batch(range(12)).padded(shape), batch(range(11, -1, -1))):
        model.zero_grad()
        model.loss(step_batch, TABLE.read(step_batch.distinct)).backward()
        gradients.append(model.item_ids.weight.grad.clone())
    assert torch.equal(gradients[1][0], torch.zeros(8))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-15)


def with_cold_negatives(step_batch: Batch) -> Batch:
    """Return a batch with cold items among its distinct ones, as losses with further negatives have them."""
    cold = torch.arange(ITEMS - COLD + 1, ITEMS + 1)
    distinct = torch.cat([step_batch.distinct, cold])
    users = len(step_batch.users)
    bits = torch.zeros(users, -(-len(distinct) // 32), dtype=torch.int32)
    bits[:, : step_batch.history_bits.shape[1]] = step_batch.history_bits
    multiplicity = torch.cat([step_batch.multiplicity, torch.ones_like(cold)])
    return replace(step_batch, distinct=distinct, multiplicity=multiplicity, history_bits=bits)


def test_items_without_training_stay_zero_also_as_negatives():
    model = build()
    model.log_popularity[~model.log_popularity.isfinite()] = -5.0  # of cold items, which in-batch losses never read
    step = TrainingStep(model, dict.fromkeys(model.parameter_groups(), 1e-2), CPU)
    before = model.item_ids.weight.detach().clone()
    for number in range(4):
        step_batch = with_cold_negatives(batch(range(number, number + 12), number))
        states = TABLE.read(step_batch.distinct)
        assert torch.isfinite(step(step_batch, states))
        assert not model.item_ids.weight.grad[0].any()
    after = model.item_ids.weight.detach()
    assert not after[0].any() and not torch.equal(after[1:], before[1:])
    cold = torch.arange(ITEMS - COLD + 1, ITEMS + 1)
    assert not model.item_ids(cold, None).any() and not model.item_ids(cold, 3).any()
    model.eval()
    catalogue = model.catalogue_vectors(TABLE)
    model.item_ids = None
    content = model.catalogue_vectors(TABLE)
    assert torch.equal(catalogue[-COLD:], content[-COLD:])
    assert not torch.equal(catalogue, content)


def test_catalogue_vectors_are_sums_without_dropout_in_either_mode():
    model = build()
    expected = model.item_encoder(TABLE.read(torch.arange(1, ITEMS + 1))).detach().clone()
    expected[TRAINED - 1] += model.item_ids.weight[1:].detach()
    torch.testing.assert_close(model.catalogue_vectors(TABLE), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.eval().catalogue_vectors(TABLE), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "id", "item_ids": True}, "item_ids: id has a trained vector of each item already; leave it out"),
        ({"item_id_dropout": 0.5}, "item_id_dropout: is for the vectors that item_ids adds; give item_ids, or"),
        ({"item_ids": True, "item_id_dropout": 1.0}, "item_id_dropout: expected 0 to below 1, found 1.0"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**settings)
