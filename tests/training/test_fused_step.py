"""Check the fused step on a CPU against autograd, and the models and batches that it refuses."""

from __future__ import annotations

import gc
import logging
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
from helpers.training_steps import assert_identical, everything
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import dispatch, ops
from iisan_fast.kernels.cpu.step import CpuStep
from iisan_fast.kernels.cpu.step_calls import StepCalls
from iisan_fast.models.recommender import Recommender
from iisan_fast.states.feature_table import FeatureTable
from iisan_fast.training.fused_step import CpuFusedStep, fused_step_refusal
from iisan_fast.training.training_step import Reading, TrainingStep

pytestmark = [
    needs_compiler,
    pytest.mark.usefixtures("threads_given_back"),
]

CPU = torch.device("cpu")
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
RATES = {"adapters": 1e-4, "gates": 2e-4, "heads": 3e-4, "sequence_encoder": 4e-4}


@pytest.fixture(autouse=True)
def nan_in_new_memory(monkeypatch) -> None:
    """Fill new memory with NaN, so that reading it before it is written changes results."""
    empty = StepCalls.empty
    monkeypatch.setattr(StepCalls, "empty", lambda self, *shape: empty(self, *shape).fill_(float("nan")))


def data(longest: int = 14) -> Sequences:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(5, longest, USERS)]
    return make_sequences(histories, items=ITEMS)


SEQUENCES = data()


def build(config: ModelConfig, shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> Recommender:
    """Return a model in training mode whose gates and biases are not 0."""
    popularity = np.maximum(SEQUENCES.popularity, 1e-4)
    model = side_recommender(shapes, config, SEQUENCES.max_inputs, popularity, 1).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model.train()


def new_step(case: str = "three towers", dtype: torch.dtype = torch.float64) -> tuple[CpuFusedStep, FeatureTable]:
    """Return a fused step with its first weights, and a table for it."""
    config, shapes = CASES[case]
    return CpuFusedStep(build(config, shapes, dtype), RATES), random_table(shapes, ITEMS, dtype)


def batch(users: slice | range = range(24), step: int = 3) -> Batch:
    return make_batch(SEQUENCES, np.arange(USERS)[users], step)


def taken(step: CpuFusedStep, step_batch: Batch, states: list[kernels.States]) -> list[Tensor]:
    """Take a step, and return copies of the loss and of the gradients."""
    loss = step(step_batch, states)
    assert not loss.requires_grad
    return [loss.clone(), *(parameter.grad.clone() for parameter in step.model.parameters())]


def by_autograd(model: Recommender, step_batch: Batch, states: list[kernels.States]) -> list[Tensor]:
    """Return the loss and the gradients by autograd."""
    loss = model.loss(step_batch, states)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def check(step: CpuFusedStep, step_batch: Batch, table: FeatureTable, tolerance: float = 1e-10) -> None:
    """Compare the loss and each gradient of a step with those of the single ops, which other tests check."""
    states = table.read(step_batch.distinct)
    expected = by_autograd(step.model, step_batch, states)
    names = ["loss", *(name for name, _ in step.model.named_parameters())]
    for result, like, name in zip(taken(step, step_batch, states), expected, names, strict=True):
        assert result.shape == like.shape and (result - like).norm() <= tolerance * like.norm(), name
        assert like.any(), name


# Numbers


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_single_ops(case, threads):
    torch.set_num_threads(threads)
    step, table = new_step(case)
    check(step, batch(), table)
    step.model.eval()
    check(step, batch(), table)  # no dropout


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_states_of_single_or_half_precision(kind):
    step, _ = new_step(dtype=torch.float32)
    check(step, batch(), random_table(TWO, ITEMS, kind), tolerance=2e-6)


@pytest.mark.parametrize("case", ["three towers", "one view, a bottleneck of no panel"])
def test_steps_train_as_those_by_autograd(case):
    """Batches of all sizes are taken one after the other; weights, Adam's state and the record stay close."""
    config, shapes = CASES[case]
    table = random_table(shapes, ITEMS)
    fused = CpuFusedStep(build(config, shapes), RATES)
    autograd_step = TrainingStep(build(config, shapes), RATES, CPU)
    for number, users in enumerate([range(24), range(20, 23), range(60), range(2), range(30, 60)]):
        step_batch = batch(users, number)
        losses = [step(step_batch, table.read(step_batch.distinct)).item() for step in (fused, autograd_step)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    ours, theirs = everything(fused), everything(autograd_step)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-11 * value.norm(), name
    first, second = fused.read(), autograd_step.read()
    assert first.rows == second.rows and first.loss == pytest.approx(second.loss, rel=1e-12)
    assert fused.storage.steps == 5


def test_numbers_repeat_in_memory_that_was_used_before():
    results = []
    for earlier_batches in ([], [range(60), range(7)]):
        step, table = new_step()
        before = everything(step)
        for users in earlier_batches:  # these steps change the weights, which are put back
            step(batch(users), table.read(batch(users).distinct))
        with torch.no_grad():
            for name, parameter in step.model.named_parameters():
                parameter.copy_(before[name])
        results.append(taken(step, batch(), table.read(batch().distinct)))
    assert all(map(torch.equal, *results))


def test_states_that_were_gathered_ahead_or_have_numbers_of_their_own():
    states = random_table(TWO, ITEMS).read(batch().distinct)
    ahead = [kernels.States(view.table[view.rows]) for view in states]
    numbered = [kernels.States(view.table, view.rows.clone()) for view in states]
    expected, *other_results = (taken(new_step()[0], batch(), inputs) for inputs in (states, ahead, numbered))
    for results in other_results:
        assert all(map(torch.equal, results, expected))


# Memory


def counted(monkeypatch) -> list[weakref.ref]:
    """Return a list of references to each step's memory, which must be free when the next step is made."""
    steps = []
    make = kernels.cpu_step

    def alone(*arguments) -> CpuStep:
        gc.collect()
        assert not any(before() for before in steps)  # the old memory is free before more is allocated
        steps.append(weakref.ref(step := make(*arguments)))
        return step

    monkeypatch.setattr(kernels, "cpu_step", alone)
    return steps


def test_memory_grows_with_batches_and_is_used_for_smaller_ones_again(monkeypatch):
    step, table = new_step()
    steps = counted(monkeypatch)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for users in (range(24), range(20, 23), range(60), range(2), range(30, 60), range(3)):
            check(step, batch(users), table)
    assert len(steps) == 4  # for 24 users, for 60, and for two other numbers of threads


def test_memory_for_many_items_and_few_rows_is_that_for_the_reverse(monkeypatch):
    step, table = new_step()
    steps = counted(monkeypatch)
    nine_users = batch(range(9))
    shape = nine_users.shape._replace(users=13, length=10)
    wide, long = (nine_users.padded(shape._replace(**more)) for more in (dict(distinct=180), dict(rows=200)))
    for padded in (wide, long, wide, long):
        check(step, padded, table)
    assert len(steps) == 2


def test_memory_that_was_given_back_is_taken_again(monkeypatch):
    step, table = new_step()
    steps = counted(monkeypatch)
    check(step, batch(), table)
    step.release()
    gc.collect()
    assert steps[0]() is None
    check(step, batch(), table)
    assert len(steps) == 2


def test_no_states_are_kept():
    step, table = new_step()
    step_batch = batch()
    states = [kernels.States(view.table[view.rows]) for view in table.read(step_batch.distinct)]
    reference = weakref.ref(states[0].table)
    step(step_batch, states)
    del states
    gc.collect()
    assert reference() is None


def test_a_graph_that_saved_a_parameter_refuses_to_go_back():
    step, table = new_step()
    step_batch = batch()
    loss = step.model.loss(step_batch, table.read(step_batch.distinct))
    step(step_batch, table.read(step_batch.distinct))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Losses that are not finite, and readings


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_updated_from_a_loss_on_that_is_not_finite(first, value):
    step, table = new_step()
    rows = 0
    losses = 0.0
    for number in range(5):
        step_batch = batch(range(10 + number), number)
        states = table.read(step_batch.distinct)
        if number == first:
            before = everything(step)
            states = [kernels.States(torch.full_like(view.table, value), view.rows) for view in states]
        loss = step(step_batch, states).item()
        assert np.isfinite(loss) == (number != first)
        if number < first:
            rows, losses = rows + len(step_batch.targets), losses + loss * len(step_batch.targets)
    assert_identical(everything(step), before)
    assert step.storage.steps == first
    reading = step.read()
    assert (reading.failed_step, reading.rows) == (first + 1, rows) and not np.isfinite(reading.failed_loss)
    assert reading.loss == pytest.approx(losses, rel=1e-12)
    again = step.read()
    assert (again.loss, again.rows, again.failed_step) == (0.0, 0, first + 1)


def test_padding_counts_no_rows():
    step, table = new_step()
    nine_users = batch(range(9))
    padded = nine_users.padded(padded_shape(SEQUENCES, 12))
    loss = step(padded, table.read(padded.distinct)).item()
    assert step.read() == Reading(
        pytest.approx(loss * len(nine_users.targets), rel=1e-12), len(nine_users.targets), None, 0.0
    )


def test_phases_are_marked_in_order():
    step, table = new_step()
    seen = []
    step(batch(), table.read(batch().distinct), lambda phase: seen.append((phase, step.storage.steps.item())))
    assert seen == [("forward", 1), ("backward", 1), ("update", 1)]


def test_what_a_mark_raises_comes_out_when_all_calls_have_ended():
    step, table = new_step()

    def fail(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step(batch(), table.read(batch().distinct), fail)
    check(step, batch(), table)


# Refusals


def changed(step_batch: Batch, field: str, value: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with `value` applied to one field."""
    return replace(step_batch, **{field: value(getattr(step_batch, field))})


def apart(tensor: Tensor) -> Tensor:
    """Return the same numbers in a tensor that is not contiguous."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inputs", lambda inputs: inputs + ITEMS, r"batch\.inputs: expected indices from 0 to \d+, found \d+"),
        ("targets", lambda targets: targets - 1, r"batch\.targets: expected indices from 0 to \d+, found -1"),
        ("row_users", lambda users: users + 1, r"batch\.row_users: expected indices from 0 to 23, found 24"),
        ("history_bits", lambda bits: bits[:, :1].contiguous(), r"batch\.history_bits: expected contiguous int32 \[24"),
        ("inputs", lambda inputs: inputs[:-1], r"batch\.inputs: expected contiguous int64 \[\d+\] on cpu"),
        ("weights", lambda weights: weights[:-1], r"batch\.row_weights: expected contiguous float64"),
        ("weights", apart, r"batch\.row_weights: .*, not contiguous"),
        ("history_bits", apart, r"batch\.history_bits: .*, not contiguous"),
        ("multiplicity", lambda numbers: numbers.int(), r"batch\.multiplicity: expected contiguous int64"),
        ("row_slots", lambda slots: slots + 10**4, r"batch\.grid\.slots: expected indices"),
        ("block", lambda _: slice(0, 1), r"batch\.block: expected none, found slice\(0, 1, None\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_trains_nothing(field, value, message):
    step, table = new_step()
    step_batch = batch()
    before = everything(step)
    for _ in range(2):  # the second time, the step has memory
        with pytest.raises(ValueError, match=message):
            step(changed(step_batch, field, value), table.read(step_batch.distinct))
        assert_identical(everything(step), before)
        check(step, step_batch, table)
        before = everything(step)


def test_states_that_do_not_fit_are_refused():
    step, table = new_step()
    step_batch = batch()
    first, second = table.read(step_batch.distinct)
    for states, message in (
        ([first], "expected 2 views, found 1"),
        ([first, kernels.States(second.table.float(), second.rows)], r"states\[1\]: expected .* of float64"),
        ([kernels.States(view.table.half(), view.rows) for view in (first, second)], "expected float64 or bfloat16"),
        ([first, kernels.States(second.table[:, :2], second.rows)], r"states\[1\]: expected \[\., 3, 32\]"),
        (
            [first, kernels.States(second.table[: int(step_batch.distinct.max())], second.rows)],
            r"states\[1\]\.rows: expected",
        ),
        ([first, kernels.States(second.table[:3])], r"states\[1\]: expected the \d+ items of the batch, found 3"),
        (
            [first, kernels.States(second.table.transpose(1, 2).contiguous().transpose(1, 2), second.rows)],
            "in one piece",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            step(step_batch, states)
    check(step, step_batch, table)


def short(tensors: kernels.StepTensors, name: str) -> kernels.StepTensors:
    """Return the tensors of a step with one of Adam's shorter by a number, a line or a group."""
    return tensors._replace(adam=tensors.adam._replace(**{name: getattr(tensors.adam, name)[:-1]}))


def with_gradient(tensors: kernels.StepTensors, number: int, gradient: Tensor) -> kernels.StepTensors:
    """Return the tensors of a step with another gradient of a weight."""
    before = tensors.gradients.tensors()[number]
    return tensors._replace(gradients=tensors.gradients.mapped(lambda old: gradient if old is before else old))


def without_a_head(tensors: kernels.StepTensors) -> kernels.StepTensors:
    return tensors._replace(weights=tensors.weights._replace(heads=tensors.weights.heads[:1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (lambda tensors, name=name: short(tensors, name), rf"adam\.{name}: expected contiguous float64 \[\d+\]")
            for name in ("parameters", "gradients", "means", "squares", "decays")
        ),
        (lambda tensors: short(tensors, "line_groups"), r"adam\.parameters: expected contiguous float64 \[\d+\]"),
        (lambda tensors: short(tensors, "rates"), r"adam\.decays: expected contiguous float64 \[3\]"),
        (lambda tensors: with_gradient(tensors, 0, torch.zeros(1)), r"gradients\[0\]: expected contiguous float64"),
        (lambda tensors: tensors._replace(record=torch.zeros(4)), r"record: expected contiguous float64 \[4\]"),
        (lambda tensors: tensors._replace(loss=torch.zeros(0)), r"loss: expected contiguous float64 \[\]"),
        (without_a_head, "weights: it needs heads and a fusion that fit the towers"),
    ],
)
def test_tensors_that_do_not_fit_their_weights_are_refused(change, message):
    step, table = new_step()
    operands = step.model.step_operands(batch(), table.read(batch().distinct))
    with pytest.raises(ValueError, match=message):
        kernels.cpu_step(change(step.tensors()), operands)
    kernels.cpu_step(step.tensors(), operands)


def test_a_batch_that_is_larger_than_the_memory_is_refused():
    step, table = new_step()
    small, large = (
        step.model.step_operands(one, table.read(one.distinct)) for one in (batch(range(3)), batch(range(60)))
    )
    with pytest.raises(ValueError, match=r"batch: expected at most \d+ items and \d+ rows .*, found \d+ items and"):
        kernels.cpu_step(step.tensors(), small).run(large, [])


def test_a_model_that_was_moved_is_refused():
    step, table = new_step()
    step.model.float()
    with pytest.raises(RuntimeError, match="left their flat storage"):
        step(batch(), table.read(batch().distinct))


@pytest.mark.parametrize(
    ("config", "shapes", "reason"),
    [
        (dict(embedding_dim=8), TWO, "widths that are multiples of 16"),
        (dict(sanb="phm"), TWO, "weights are products of others"),
        (dict(sanb="low-rank"), TWO, "weights are products of others"),
        (dict(bottlenecks={"first": 12}), TWO, "towers differ in shape"),
        (dict(method="iisan-versa"), [(3, 32), (2, 48)], "towers differ in shape"),
    ],
)
def test_models_that_train_by_autograd_say_why(config, shapes, reason):
    model = build(ModelConfig(**{**SMALL, **config}), shapes)
    refusal = fused_step_refusal(model, CPU, torch.float32)
    assert reason in refusal and "\n" not in refusal


def test_frozen_weights_other_devices_and_named_forms_are_refused(monkeypatch):
    model = build(*CASES["three towers"])
    assert fused_step_refusal(model, CPU, torch.float32) == ""
    monkeypatch.setenv(kernels.FORM_VARIABLE, "cpu")
    assert fused_step_refusal(model, CPU, torch.float32) == ""
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    assert fused_step_refusal(model, CPU, torch.float32) == "IISAN_FAST_FORM names reference"
    monkeypatch.delenv(kernels.FORM_VARIABLE)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "why_no_library", lambda: "no C++ compiler is here")
        assert fused_step_refusal(model, CPU, torch.float32) == "no C++ compiler is here"
    model.item_encoder.side_network.first.gate.requires_grad_(False)
    assert fused_step_refusal(model, CPU, torch.float32) == "item_encoder.side_network.first.gate is not trained"


@pytest.mark.parametrize("name", ["query", "feed_in", "feed_out", "feed_norm"])
def test_sequence_weights_of_another_shape_are_refused(name):
    model = build(*CASES["three towers"])
    module = getattr(model.sequence_encoder.blocks[1], name)
    weight = module.weight[..., :-8] if name != "feed_in" else module.weight[:-16]
    module.weight = torch.nn.Parameter(weight.clone())
    assert "it needs" in fused_step_refusal(model, CPU, torch.float32)


def test_the_forms_are_reported_as_those_that_ran(monkeypatch, caplog):
    step, table = new_step()
    monkeypatch.setattr(dispatch, "reported", set())
    with caplog.at_level(logging.INFO):
        step(batch(), table.read(batch().distinct))
    names = {"fold_heads", "side_towers", "sequence_encoder", "inbatch_cross_entropy", "adam"}
    assert dispatch.reported == {(name, "cpu") for name in names}
    assert len(caplog.records) == len(names)
