"""The recommender's loss and gradients by C++ in one go, beside the same by one op after the other."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import make_sequences, random_table, side_recommender
from torch import Tensor

from iisan_fast import kernels
from iisan_fast.batches import Batch, make_batch
from iisan_fast.config import ModelConfig
from iisan_fast.feature_table import FeatureTable
from iisan_fast.kernels import native, recommender_native
from iisan_fast.recommender import Recommender
from iisan_fast.sequences import Sequences

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "C++ is here")

USERS, ITEMS = 60, 130
SMALL = dict(embedding_dim=16, bottleneck=8)
TWO, ONE = [(3, 32), (3, 32)], [(2, 48)]
CASES = {
    "three towers": (ModelConfig(**SMALL), TWO),
    "GELU, no gates": (ModelConfig(**SMALL, activation="gelu", gates=False), TWO),
    "inter alone": (ModelConfig(**SMALL, intra=False), TWO),
    "intra alone": (ModelConfig(**SMALL, inter=False), TWO),
    "one view, a bottleneck of no panel": (ModelConfig(embedding_dim=32, bottleneck=5), ONE),
    "versa": (ModelConfig(**SMALL, method="iisan-versa"), TWO),
    "one block, four heads, no dropout": (ModelConfig(**SMALL, blocks=1, attention_heads=4, dropout=0), ONE),
}


@pytest.fixture(autouse=True)
def threads_given_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def data(longest: int = 14) -> Sequences:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(5, longest, USERS)]
    return make_sequences(histories, items=ITEMS)


SEQUENCES = data()


def build(config: ModelConfig, table: FeatureTable, dtype: torch.dtype = torch.float64) -> Recommender:
    """A model in training mode whose gates and biases act."""
    popularity = np.maximum(SEQUENCES.popularity, 1e-4)
    model = side_recommender(table.shapes, config, SEQUENCES.max_inputs, popularity, 1).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model.train()


def made(case: str = "three towers", dtype: torch.dtype = torch.float64) -> tuple[Recommender, FeatureTable]:
    config, shapes = CASES[case]
    table = random_table(shapes, ITEMS, dtype)
    return build(config, table, dtype), table


def batch(users: slice | range = range(24), step: int = 3) -> Batch:
    return make_batch(SEQUENCES, np.arange(USERS)[users], step)


def is_one_op(loss: Tensor) -> bool:
    return isinstance(loss.grad_fn, recommender_native._Loss._backward_cls)


def gradients(model: Recommender, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def check(model: Recommender, own: Batch, table: FeatureTable, tolerance: float = 1e-10) -> None:
    """The loss and each gradient beside those of one op after the other, which tests elsewhere compare with the
    reference."""
    states = table.states(own.distinct)
    loss, expected = model.loss(own, states), model._loss_by_ops(own, states)
    assert is_one_op(loss) and not is_one_op(expected)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for found, like, (name, _) in zip(gradients(model, loss), gradients(model, expected), model.named_parameters()):
        assert found.shape == like.shape and (found - like).norm() <= tolerance * like.norm(), name
        assert like.any(), name


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_single_ops(case, threads):
    torch.set_num_threads(threads)
    model, table = made(case)
    check(model, batch(), table)
    check(model.eval(), batch(), table)  # nothing drops


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_states_of_single_or_half_precision(kind):
    model, _ = made(dtype=torch.float32)
    table = random_table(TWO, ITEMS, kind)
    check(model, batch(), table, tolerance=2e-6)


def test_batches_of_all_sizes_in_turn():
    """Memory grows with them, and is used for smaller ones again."""
    model, table = made()
    for users in (range(24), range(20, 23), range(60), range(2), range(30, 60), range(3)):
        check(model, batch(users), table)
    assert len(model.loss_op._free) == 1


def test_padded_batches():
    model, table = made()
    own = batch(range(9))
    check(model, own.padded(own.shape.padded(12, SEQUENCES.max_inputs)), table)


def test_states_that_were_gathered_ahead_or_have_numbers_of_their_own():
    model, table = made()
    own = batch()
    ahead = [kernels.States(view.table[view.rows]) for view in table.states(own.distinct)]
    expected = model.loss(own, table.states(own.distinct))
    numbered = [kernels.States(view.table, view.rows.clone()) for view in table.states(own.distinct)]
    for found in (model.loss(own, ahead), model.loss(own, numbered)):
        assert is_one_op(found) and torch.equal(found, expected)
        assert all(map(torch.equal, gradients(model, found), gradients(model, model.loss(own, ahead))))


def test_numbers_repeat_in_memory_that_was_used_before():
    model, table = made()
    own, states = batch(), table.states(batch().distinct)
    first = [model.loss(own, states).detach(), *gradients(model, model.loss(own, states))]
    check(model, batch(range(60)), table)
    again = [model.loss(own, states).detach(), *gradients(model, model.loss(own, states))]
    assert all(map(torch.equal, first, again))


def test_graphs_beside_each_other_have_memory_of_their_own():
    model, table = made()
    parts = [batch(range(24)), batch(range(30, 50))]
    apart = [gradients(model, model.loss(own, table.states(own.distinct))) for own in parts]
    one, other = (model.loss(own, table.states(own.distinct)) for own in parts)
    assert is_one_op(one) and is_one_op(other)
    for found, first, second in zip(gradients(model, 2 * other - one), *apart):
        torch.testing.assert_close(found, 2 * second - first, rtol=1e-9, atol=1e-12)


def test_gradients_add_up_in_the_parameters():
    model, table = made()
    own = batch()
    expected = gradients(model, model.loss(own, table.states(own.distinct)))
    for times in (1, 2, 3):
        model.loss(own, table.states(own.distinct)).backward()
        for parameter, gradient in zip(model.parameters(), expected):
            torch.testing.assert_close(parameter.grad, times * gradient, rtol=1e-12, atol=1e-14)


def test_a_kept_graph_goes_back_twice():
    model, table = made()
    own = batch()
    loss = model.loss(own, table.states(own.distinct))
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, gradients(model, loss)))


def test_weights_that_changed_in_between_are_refused():
    model, table = made()
    own = batch()
    loss = model.loss(own, table.states(own.distinct))
    with torch.no_grad():
        model.item_encoder.heads.fusion.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["other memory", "other dtype", "another tensor"])
def test_weights_that_moved_are_found(change):
    model, table = made()
    check(model, batch(), table)
    weight = model.item_encoder.side_network.inter.down_weight
    if change == "other memory":
        weight.data = 2 * weight.data
    if change == "another tensor":
        model.item_encoder.side_network.inter.down_weight = torch.nn.Parameter(3 * weight.data)
    if change == "other dtype":
        model.float()
        table = FeatureTable(tuple(view.float() for view in table.views))
    check(model, batch(), table, tolerance=2e-6 if change == "other dtype" else 1e-10)


def test_frozen_weights_get_no_gradient():
    model, table = made()
    own, gate = batch(), model.item_encoder.side_network.first.gate
    gate.requires_grad_(False)
    loss = model.loss(own, table.states(own.distinct))
    loss.backward()
    assert is_one_op(loss) and gate.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter is not gate)


def test_copies_of_a_model_have_memory_of_their_own():
    model, table = made()
    check(model, batch(), table)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.loss_op is not model.loss_op and not other.loss_op._free
        check(other, batch(), table)


def test_no_states_are_kept_once_a_graph_has_ended():
    model, table = made()
    own = batch()
    states = [kernels.States(view.table[view.rows]) for view in table.states(own.distinct)]
    kept = weakref.ref(states[0].table)
    model.loss(own, states).backward()
    del states
    gc.collect()
    assert kept() is None and len(model.loss_op._free) == 1


def changed(field: str, value: Callable[[Tensor], Tensor]) -> Callable[[Recommender, Batch], Batch]:
    def change(_: Recommender, own: Batch) -> Batch:
        return Batch(**{**vars(own), field: value(getattr(own, field))})

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (changed("inputs", lambda inputs: inputs + ITEMS), IndexError),
        (changed("targets", lambda targets: targets - 1), ValueError),
        (changed("row_users", lambda users: users + 1), ValueError),
        (changed("history_bits", lambda bits: bits[:, :1]), ValueError),
        (changed("inputs", lambda inputs: inputs[:-1]), ValueError),
        (changed("weights", lambda weights: weights[:-1]), RuntimeError),
    ],
    ids=["inputs", "targets", "users", "bits", "a row without input", "a row without weight"],
)
def test_what_does_not_fit_is_refused_by_the_single_ops(change, error):
    model, table = made()
    own = batch()
    bad = change(model, own)
    with pytest.raises(error):
        model.loss(bad, table.states(own.distinct))
    check(model, own, table)


@pytest.mark.parametrize(
    "config",
    [
        dict(embedding_dim=8),
        dict(sanb="phm"),
        dict(bottlenecks={"first": 12}),
    ],
    ids=["width", "weights made of others", "two bottlenecks"],
)
def test_other_models_take_the_single_ops(config):
    table = random_table(TWO, ITEMS, torch.float64)
    model, own = build(ModelConfig(**{**SMALL, **config}), table), batch()
    loss = model.loss(own, table.states(own.distinct))
    assert loss.requires_grad and not is_one_op(loss)


def test_states_of_unlike_views_take_the_single_ops():
    model, table = made()
    own = batch()
    first, second = table.states(own.distinct)
    loss = model.loss(own, [first, kernels.States(second.table.float(), second.rows)])
    assert loss.requires_grad and not is_one_op(loss)


@pytest.mark.parametrize("backend", ["torch", "host"])
def test_other_backends_take_the_single_ops(backend, monkeypatch):
    model, table = made()
    own = batch()
    expected = model.loss(own, table.states(own.distinct))
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, backend)
    loss = model.loss(own, table.states(own.distinct))
    assert is_one_op(expected) and not is_one_op(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_without_gradients_nothing_is_kept():
    model, table = made()
    own = batch()
    with torch.no_grad():
        loss = model.loss(own, table.states(own.distinct))
    assert not loss.requires_grad and not model.loss_op._free
