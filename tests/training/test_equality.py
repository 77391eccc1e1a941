"""Check the whole training step against the independent reference, on real Scientific batches and corner cases."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.datasets import make_sequences
from helpers.equality import (
    FORMS,
    Result,
    Step,
    first_parameters,
    from_reference,
    fused_gpu_step,
    named_by_reference,
    rates_by_name,
    reference_loss_of,
    scientific_step,
)
from helpers.tables import random_table
from helpers.training_steps import assert_identical, everything
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, epoch_batches
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.states.item_source import ItemSource
from iisan_fast.states.loader import planned_batches, prepared_batches
from iisan_fast.training.checkpoints import (
    adam_tensors,
    load_adam,
    load_checkpoint,
    load_weights,
    named_weights,
    save_checkpoint,
)
from iisan_fast.training.fused_step import CpuFusedStep, FusedStep, GpuFusedStep

IISAN = dict(embedding_dim=32, bottleneck=8)  # the smallest sizes that Triton's sequence encoder takes
VERSA = dict(IISAN, method="iisan-versa")
CASES = {
    "iisan": (ModelConfig(**IISAN), [(4, 32), (4, 32)]),
    "iisan, published sizes, narrow states": (ModelConfig(), [(7, 48), (7, 48)]),
    "iisan without gates, GELU": (ModelConfig(**IISAN, gates=False, activation="gelu"), [(3, 32), (3, 32)]),
    "iisan without inter": (ModelConfig(**IISAN, inter=False), [(3, 32), (3, 32)]),
    "iisan without intra": (ModelConfig(**IISAN, intra=False), [(3, 32), (3, 32)]),
    "one view": (ModelConfig(**IISAN), [(3, 32)]),
    "towers of two bottlenecks": (ModelConfig(**IISAN, bottlenecks={"first": 12, "inter": 12}), [(4, 32), (4, 32)]),
    "versa, equal": (ModelConfig(**VERSA), [(4, 32), (4, 32)]),
    "versa, first wider and deeper": (ModelConfig(**VERSA), [(5, 32), (3, 20)]),
    "versa, second wider, first deeper": (ModelConfig(**VERSA), [(6, 20), (2, 32)]),
    "versa, every tower of its own bottleneck": (
        ModelConfig(**VERSA, bottlenecks={"second": 4, "inter": 12}),
        [(3, 20), (5, 32)],
    ),
    "versa, equal widths, second deeper": (ModelConfig(**VERSA), [(2, 24), (6, 24)]),
    "one view of 32 dimensions, GELU, no gates": (ModelConfig(**IISAN, activation="gelu", gates=False), [(3, 48)]),
    "one block, four heads, no dropout": (ModelConfig(**IISAN, blocks=1, attention_heads=4, dropout=0), [(2, 32)]),
}


@pytest.fixture(scope="module")
def expected(scientific):
    """Return a function that gives (step, the reference's result) of a case, computed once for all forms."""

    @functools.cache
    def of(case: str, users: int) -> tuple[Step, Result]:
        step = scientific_step(scientific, *CASES[case], users)
        return step, from_reference(step)

    return of


def scientific_cases() -> list:
    """List each form of each case, at 64 users.

    `make test` runs only some of them, some at 24 users, and few in Triton's interpreter.
    """
    at_64_users = ("iisan", "iisan, published sizes, narrow states", "versa, first wider and deeper")
    cases = []
    for case, form in itertools.product(CASES, FORMS):
        interpreted = FORMS[form].by_triton
        marks = [pytest.mark.slow] if interpreted else []
        in_every_run = case in (at_64_users if FORMS[form].cases is None else FORMS[form].cases)
        cases.append(pytest.param(case, form, 64, marks=marks if in_every_run else pytest.mark.long))
        if case not in at_64_users and not interpreted:
            cases.append(pytest.param(case, form, 24))
    return cases


@pytest.mark.parametrize(("case", "form", "users"), scientific_cases())
def test_step_equals_reference_on_scientific(case, form, users, expected):
    step, result = expected(case, min(users, FORMS[form].users))
    assert all(gradient.any() for gradient in result.gradients.values())
    FORMS[form].check(step, result)


CORNERS = {
    "two-item histories": [[1, 2, 9, 9], [3, 4, 9, 9]],
    "repeats, and the longest history": [
        [5, 5, 5, 9, 9],
        [5, 6, 7, 9, 9],
        [8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 9, 9],
    ],
    "one item shared by all": [[1, 2, 3, 9, 9], [1, 4, 5, 9, 9], [6, 1, 7, 9, 9]],
}
IN_EVERY_RUN = {  # of forms that take ten seconds in the interpreter
    "fused, gpu": "repeats, and the longest history",
    "fused, gpu, pinned": "one item shared by all",
}


def corner_cases() -> list:
    cases = []
    for corner, form in itertools.product(CORNERS, FORMS):
        marks = [pytest.mark.slow] if FORMS[form].by_triton else []
        is_long = IN_EVERY_RUN.get(form, corner) != corner
        cases.append(pytest.param(corner, form, marks=pytest.mark.long if is_long else marks))
    return cases


@pytest.mark.parametrize(("corner", "form"), corner_cases())
def test_step_equals_reference_on_corner_cases(corner, form):
    histories = CORNERS[corner]
    sequences = make_sequences(histories)
    table = random_table([(3, 16), (3, 16)], 9)
    config = ModelConfig(**IISAN) if FORMS[form].by_triton else ModelConfig(embedding_dim=16, bottleneck=4)
    step = Step(config, table, sequences, np.arange(len(histories)), step=0)
    FORMS[form].check(step, from_reference(step))


@pytest.fixture(scope="module")
def published(scientific):
    """Return a function that gives (step, the reference's result) at published sizes, computed once for all forms."""

    @functools.cache
    def of(count: int) -> tuple[Step, Result]:
        users = np.random.default_rng(5).permutation(len(scientific.user_ids))[:count]
        offsets, items = scientific.training
        histories = [items[offsets[user] : offsets[user + 1]] for user in users]
        numbers = np.unique(np.concatenate(histories))
        renumbered = [[*(np.searchsorted(numbers, history) + 1).tolist(), 1, 1] for history in histories]
        sequences = make_sequences(renumbered, items=len(numbers))
        step = Step(ModelConfig(), random_table([(7, 768)] * 2, len(numbers)), sequences, np.arange(count), step=7)
        return step, from_reference(step)

    return of


# Triton's interpreter takes half a minute for the ops, and more than ten for all gradients of the fused step.
AT_PUBLISHED_SIZES = [form for form in FORMS if FORMS[form].cases is None or torch.cuda.is_available()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.long) if FORMS[form].by_triton else form for form in AT_PUBLISHED_SIZES],
)
def test_step_at_published_sizes_on_one_real_batch(form, published):
    """Width 768, seven layers and three towers have the paper's 4,113,877 parameters."""
    step, result = published(min(8, FORMS[form].users))
    FORMS[form].check(step, result)


RATES = {"adapters": 1e-3, "gates": 2e-3, "heads": 3e-3, "sequence_encoder": 4e-3}


def two_epochs(sequences: Sequences) -> list[list[Batch]]:
    """Return the batches of two epochs, of five users each; the last of an epoch has fewer."""
    return [list(epoch_batches(sequences, 5, 3, epoch)) for epoch in range(2)]


def trained_by_reference(step: Step) -> dict[str, torch.Tensor]:
    """Return the weights after both epochs, by the reference and PyTorch's Adam."""
    parameters = first_parameters(step)
    rates = rates_by_name(step, RATES)
    adam = torch.optim.Adam([{"params": [weight], "lr": rates[name]} for name, weight in parameters.items()])
    for batch in itertools.chain(*two_epochs(step.sequences)):
        adam.zero_grad()
        taken = dataclasses.replace(step, users=batch.users.numpy(), step=batch.step)
        reference_loss_of(taken, parameters).backward()
        adam.step()
    return {name: weight.detach() for name, weight in parameters.items()}


def saved_and_loaded(stopped: FusedStep, again: FusedStep, path: Path) -> None:
    """Save the checkpoint of a stopped run, and load it into another step."""
    model = stopped.model
    save_checkpoint(path, {**named_weights(model), **adam_tensors(model, stopped.optimizer)}, {"epoch": 1})
    tensors, _ = load_checkpoint(path)
    load_weights(again.model, tensors, path)
    load_adam(again.model, again.optimizer, tensors, path)


def thirteen_histories() -> Sequences:
    """Return thirteen histories, so that an epoch is three batches of five users."""
    rng = np.random.default_rng(2)
    return make_sequences([rng.integers(1, 31, length).tolist() for length in rng.integers(4, 14, 13)], items=30)


@needs_compiler
@pytest.mark.parametrize("case", ["iisan", "iisan without gates, GELU", "one view"])
def test_fused_steps_in_a_row_follow_the_reference_and_resume_exactly(case, tmp_path):
    sequences = thirteen_histories()
    model, shapes = CASES[case]
    step = Step(model, random_table(shapes, 30), sequences, np.arange(13), step=0)
    expected = trained_by_reference(step)
    results = []
    for resumed in (False, True):
        fused = CpuFusedStep(step.recommender(), RATES)
        for number, batches in enumerate(two_epochs(sequences)):
            if number and resumed:
                stopped, fused = fused, CpuFusedStep(step.recommender(), RATES)
                saved_and_loaded(stopped, fused, tmp_path / "last.safetensors")
            for prepared in prepared_batches(iter(batches), step.table, torch.device("cpu")):
                fused(prepared.batch, prepared.item_inputs)
        assert fused.storage.steps == 6
        results.append({name: weight.detach() for name, weight in named_by_reference(fused.model)})
    assert results[0].keys() == expected.keys()
    for name, weight in expected.items():
        assert (results[0][name] - weight).abs().max() <= 1e-9 * weight.abs().max(), name
        assert torch.equal(results[1][name], results[0][name]), name


@pytest.mark.long
def test_fused_steps_by_triton_follow_the_reference_and_resume_exactly(tmp_path):
    """Six steps are taken, in windows of two batches and of one; the resumed run takes the last three."""
    sequences = thirteen_histories()
    step = Step(ModelConfig(**IISAN), random_table([(2, 16)] * 2, 30), sequences, np.arange(13), step=0)
    plan = dataclasses.replace(RunPlan.of(sequences, 5, step.seed), window_batches=2, first_batches=2)
    (whole, source), (resumed, _) = (fused_gpu_step(step, plan, RATES) for _ in range(2))
    start = first_parameters(step)
    take_planned_steps(whole, source, plan, epoch=0)
    saved_and_loaded(whole, resumed, tmp_path / "last.safetensors")
    for fused_step in (whole, resumed):
        take_planned_steps(fused_step, source, plan, epoch=1)
    assert whole.storage.steps == 6 and whole.read().rows == 2 * (sequences.epoch_interactions - 13)
    assert_identical(everything(resumed), everything(whole))
    trained = {name: weight.detach().double().cpu() for name, weight in named_by_reference(whole.model)}
    for name, weight in trained_by_reference(step).items():
        moved = (weight - start[name]).detach()
        assert (trained[name] - weight).norm() <= 5e-3 * moved.norm() > 0, name


def take_planned_steps(step: GpuFusedStep, source: ItemSource, plan: RunPlan, epoch: int) -> None:
    """Take the steps of an epoch, whose windows are packed ahead."""
    batches = list(planned_batches(plan, epoch, source, step.record.device))
    assert [planned.window is not None for planned in batches] == [True, False, True]
    for planned in batches:
        step(planned)
