"""The recommender's loss and gradients by C++ in one go, beside the same by one op after the other."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.compiler import needs_compiler
from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import dispatch
from iisan_fast.kernels.cpu import whole_step
from iisan_fast.models.recommender import Recommender
from iisan_fast.states.feature_table import FeatureTable

pytestmark = [
    needs_compiler,
    pytest.mark.usefixtures("threads_given_back"),
]

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


def differentiated(model: Recommender, own: Batch, states: list[kernels.States]) -> tuple[list[Tensor], bool]:
    """(the loss and copies of the gradients that it leaves, whether the op found them)."""
    calls, op = [], whole_step.RecommenderGradients.__call__
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_step.RecommenderGradients, "__call__", lambda *all: calls.append(all) or op(*all))
        loss = model.differentiate(own, states)
    assert not loss.requires_grad
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss, *(None if each is None else each.clone() for each in gradients)], bool(calls)


def by_op(model: Recommender, own: Batch, states: list[kernels.States]) -> list[Tensor]:
    found, op = differentiated(model, own, states)
    assert op
    return found


def by_single_ops(model: Recommender, own: Batch, states: list[kernels.States]) -> list[Tensor]:
    loss = model.loss(own, states)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def check(model: Recommender, own: Batch, table: FeatureTable, tolerance: float = 1e-10) -> None:
    """The loss and each gradient beside those of the single ops, which tests elsewhere compare with the reference."""
    states = table.read(own.distinct)
    found, expected = by_op(model, own, states), by_single_ops(model, own, states)
    for own, like, name in zip(found, expected, ["loss", *(name for name, _ in model.named_parameters())], strict=True):
        assert own.shape == like.shape and (own - like).norm() <= tolerance * like.norm(), name
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


def test_batches_of_all_sizes_by_all_threads_in_turn(monkeypatch):
    """Memory grows with them, and is used for smaller ones again."""
    model, table = made()
    plans, plan = [], whole_step.StepPlan
    monkeypatch.setattr(whole_step, "StepPlan", lambda *all: plans.append(all) or plan(*all))
    sizes = (range(24), range(20, 23), range(60), range(2), range(30, 60), range(3))
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for users in sizes:
            check(model, batch(users), table)
    assert len(plans) == 2 * 3  # for 24 users, and for 60


def test_memory_for_many_items_and_few_rows_is_that_for_the_reverse(monkeypatch):
    model, table = made()
    plans, plan = [], whole_step.StepPlan

    def alone(*all) -> whole_step.StepPlan:
        assert not any(before() for before in plans)  # its memory went before there is more
        made = plan(*all)
        plans.append(weakref.ref(made))
        return made

    monkeypatch.setattr(whole_step, "StepPlan", alone)
    own = batch(range(9))
    shape = own.shape._replace(users=13, length=10)
    wide, long = (own.padded(shape._replace(**more)) for more in (dict(distinct=180), dict(rows=200)))
    for each in (wide, long, wide, long):
        check(model, each, table)
    assert len(plans) == 2


def test_padded_batches():
    model, table = made()
    own = batch(range(9))
    check(model, own.padded(padded_shape(SEQUENCES, 12)), table)


def test_states_that_were_gathered_ahead_or_have_numbers_of_their_own():
    model, table = made()
    own = batch()
    ahead = [kernels.States(view.table[view.rows]) for view in table.read(own.distinct)]
    numbered = [kernels.States(view.table, view.rows.clone()) for view in table.read(own.distinct)]
    expected = by_op(model, own, table.read(own.distinct))
    for states in (ahead, numbered):
        assert all(map(torch.equal, by_op(model, own, states), expected))


def test_numbers_repeat_in_memory_that_was_used_before():
    model, table = made()
    states = table.read(batch().distinct)
    first = by_op(model, batch(), states)
    check(model, batch(range(60)), table)
    assert all(map(torch.equal, by_op(model, batch(), states), first))


@pytest.mark.parametrize("form", ["auto", "reference"])
def test_gradients_take_the_place_of_those_before(form, monkeypatch):
    model, table = made()
    monkeypatch.setenv(kernels.FORM_VARIABLE, form)
    other, again = batch(range(30, 40)), batch()
    model.differentiate(again, table.read(again.distinct))
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.differentiate(other, table.read(other.distinct))
    assert not any(torch.equal(parameter.grad, before) for parameter, before in zip(model.parameters(), expected))
    loss = model.differentiate(again, table.read(again.distinct))
    assert not loss.requires_grad
    assert all(torch.equal(parameter.grad, before) for parameter, before in zip(model.parameters(), expected))


def test_it_is_reported_as_the_op_that_ran(monkeypatch):
    model, table = made()
    monkeypatch.setattr(dispatch, "reported", set())
    model.differentiate(batch(), table.read(batch().distinct))
    assert dispatch.reported == {("recommender_gradients", "cpu")}


def test_gradients_that_someone_took_away_are_given_again():
    model, table = made()
    states = table.read(batch().distinct)
    expected = by_op(model, batch(), states)[1:]
    gate, weight = model.item_encoder.side_network.first.gate, model.item_encoder.side_network.first.down_weight
    gate.grad, weight.grad = None, torch.zeros_like(weight)
    model.differentiate(batch(), states)
    assert all(torch.equal(parameter.grad, own) for parameter, own in zip(model.parameters(), expected))


def test_the_first_loss_is_told_before_there_are_gradients():
    told, (model, table) = [], made()
    states = table.read(batch().distinct)
    loss = model.differentiate(
        batch(), states, lambda loss: told.append((loss.clone(), [each.grad for each in model.parameters()]))
    )
    ((first, gradients),) = told
    assert torch.equal(first, loss) and set(gradients) == {None}


def test_what_is_raised_where_the_loss_is_told_comes_out_when_all_calls_have_ended():
    model, table = made()

    def told(_: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.differentiate(batch(), table.read(batch().distinct), told)
    check(model, batch(), table)


@pytest.mark.parametrize("change", ["other memory", "other dtype", "another tensor", "another activation"])
def test_weights_that_moved_are_found(change):
    model, table = made()
    check(model, batch(), table)
    weight = model.item_encoder.side_network.inter.down_weight
    if change == "other memory":
        weight.data = 2 * weight.data
    if change == "another tensor":
        model.item_encoder.side_network.inter.down_weight = torch.nn.Parameter(3 * weight.data)
    if change == "another activation":
        model.item_encoder.side_network.activation = "gelu"
    if change == "other dtype":
        model.float()
        table = FeatureTable(tuple(view.float() for view in table.views))
    check(model, batch(), table, tolerance=2e-6 if change == "other dtype" else 1e-10)


@pytest.mark.parametrize("form", ["auto", "reference"])
def test_frozen_weights_have_no_gradient(form, monkeypatch):
    model, table = made()
    monkeypatch.setenv(kernels.FORM_VARIABLE, form)
    gate, states = model.item_encoder.side_network.first.gate, table.read(batch().distinct)
    for frozen in (False, True, False):
        gate.requires_grad_(not frozen)
        model.differentiate(batch(), states)
        for parameter in model.parameters():
            assert (parameter.grad is None) == (frozen and parameter is gate)


def test_copies_of_a_model_have_memory_of_their_own():
    model, table = made()
    check(model, batch(), table)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.gradients is not model.gradients
        check(other, batch(), table)
    check(model, batch(), table)


def test_no_states_are_kept():
    model, table = made()
    own = batch()
    states = [kernels.States(view.table[view.rows]) for view in table.read(own.distinct)]
    kept = weakref.ref(states[0].table)
    by_op(model, own, states)
    del states
    gc.collect()
    assert kept() is None


def changed(own: Batch, field: str, value: Callable[[Tensor], Tensor]) -> Batch:
    return replace(own, **{field: value(getattr(own, field))})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("inputs", lambda inputs: inputs + ITEMS, IndexError),
        ("targets", lambda targets: targets - 1, ValueError),
        ("row_users", lambda users: users + 1, ValueError),
        ("history_bits", lambda bits: bits[:, :1], ValueError),
        ("inputs", lambda inputs: inputs[:-1], ValueError),
        ("weights", lambda weights: weights[:-1], RuntimeError),
        ("multiplicity", lambda multiplicity: multiplicity[:-1], ValueError),
    ],
)
def test_what_does_not_fit_is_refused_by_the_single_ops(field, value, error):
    model, table = made()
    own = batch()
    with pytest.raises(error):
        model.differentiate(changed(own, field, value), table.read(own.distinct))
    check(model, own, table)


@pytest.mark.parametrize("name", ["query", "feed_in", "feed_out", "feed_norm"])
def test_sequence_weights_of_another_shape_are_refused_by_the_single_ops(name):
    model, table = made()
    module = getattr(model.sequence_encoder.blocks[1], name)
    module.weight = torch.nn.Parameter(module.weight[..., :-8].clone() if name != "feed_in" else module.weight[:-16])
    with pytest.raises(RuntimeError):
        model.differentiate(batch(), table.read(batch().distinct))


def test_evaluation_gives_the_memory_back():
    model, table = made()
    by_op(model, batch(), table.read(batch().distinct))
    kept = weakref.ref(model.gradients._plan)
    model.eval()
    gc.collect()
    assert kept() is None


def test_numbers_out_of_a_views_range_are_refused_by_the_single_ops():
    model, table = made()
    own = batch()
    short = [kernels.States(view.table[: int(own.distinct.max())], view.rows) for view in table.read(own.distinct)]
    with pytest.raises(ValueError, match="expected indices from 0 to"):
        model.differentiate(own, short)


@pytest.mark.parametrize("field", ["row_weights", "history_bits", "multiplicity"])
def test_numbers_that_do_not_stand_together_are_left_to_the_single_ops(field):
    model, table = made()
    own = batch()
    name = "weights" if field == "row_weights" else field
    apart = changed(own, name, lambda each: each.repeat_interleave(2, dim=-1)[..., ::2])
    found, op = differentiated(model, apart, table.read(own.distinct))
    assert not op and torch.equal(found[0], by_single_ops(model, apart, table.read(own.distinct))[0])


@pytest.mark.parametrize(
    "config",
    [dict(embedding_dim=8), dict(sanb="phm"), dict(bottlenecks={"first": 12})],
    ids=["width", "weights made of others", "two bottlenecks"],
)
def test_other_models_take_the_single_ops(config):
    table = random_table(TWO, ITEMS, torch.float64)
    model, own = build(ModelConfig(**{**SMALL, **config}), table), batch()
    found, op = differentiated(model, own, table.read(own.distinct))
    expected = by_single_ops(model, own, table.read(own.distinct))
    assert not op and all(map(torch.equal, found, expected))


def test_states_of_unlike_views_take_the_single_ops():
    model, table = made()
    first, second = table.read(batch().distinct)
    found, op = differentiated(model, batch(), [first, kernels.States(second.table.float(), second.rows)])
    assert not op and all(each is not None for each in found)


def test_the_reference_takes_the_single_ops(monkeypatch):
    model, table = made()
    expected = by_op(model, batch(), table.read(batch().distinct))
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    found, op = differentiated(model, batch(), table.read(batch().distinct))
    assert not op
    for own, like in zip(found, expected, strict=True):
        assert (own - like).norm() <= 1e-10 * like.norm()
