"""Check what may be added to Adam against PyTorch's own parts: decay, schedules, clipping, averages, in every step."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from helpers.compiler import needs_compiler
from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast.config import ModelConfig, TrainConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.errors import InputError
from iisan_fast.kernels.cpu.adam import FlatAdamCalls
from iisan_fast.kernels.cpu.step_calls import StepCalls
from iisan_fast.models.item_encoders import IdItemEncoder
from iisan_fast.models.recommender import Recommender
from iisan_fast.states.feature_table import FeatureTable
from iisan_fast.training.averaged_weights import averaged_weights
from iisan_fast.training.flat_storage import FlatStorage
from iisan_fast.training.fused_step import CpuFusedStep
from iisan_fast.training.learning_rates import RateSchedule
from iisan_fast.training.training_step import CapturedStep, TrainingStep
from iisan_fast.training.update_options import UpdateOptions

CPU = torch.device("cpu")
SMALL = ModelConfig(embedding_dim=16, bottleneck=8)
SHAPES = [(3, 32), (3, 32)]
ITEMS = 40
RATES = {"adapters": 1e-2, "gates": 2e-2, "heads": 3e-3, "sequence_encoder": 4e-3}
STEPS = 4
SCHEDULE = RateSchedule("cosine", warmup=1.5, steps=STEPS)
DECAY = UpdateOptions(weight_decay=2.0)
CLIP = UpdateOptions(clip_norm=0.3)
AVERAGE = UpdateOptions(ema_decay=0.75)
ALL = UpdateOptions(weight_decay=2.0, clip_norm=0.3, ema_decay=0.75, scheduled=True)
SEQUENCES = make_sequences(
    [np.random.default_rng(user).integers(1, ITEMS + 1, 5 + user % 7).tolist() for user in range(24)], items=ITEMS
)
TABLE = random_table(SHAPES, ITEMS, torch.float64)
SHAPE = padded_shape(SEQUENCES, 12)


def build() -> Recommender:
    """Return a model in float64 and training mode, always with the same weights."""
    return side_recommender(SHAPES, SMALL, SEQUENCES.max_inputs, np.full(ITEMS + 1, 0.1), 1).double().train()


def batches() -> list[Batch]:
    return [make_batch(SEQUENCES, np.arange(12) + 3 * step, step) for step in range(STEPS)]


def scheduled_batches(step: CpuFusedStep | TrainingStep, options: UpdateOptions) -> Iterator[Batch]:
    """Yield the batches, each after the step got its learning rates if the options say that they change."""
    for number, batch in enumerate(batches()):
        if options.scheduled:
            step.scale_rates(SCHEDULE.factor(number))
        yield batch


def by_cpu_fused_step(options: UpdateOptions) -> CpuFusedStep:
    step = CpuFusedStep(build(), RATES, options)
    for batch in scheduled_batches(step, options):
        step(batch, TABLE.read(batch.distinct))
    return step


def by_autograd(options: UpdateOptions) -> TrainingStep:
    step = TrainingStep(build(), RATES, CPU, options)
    for batch in scheduled_batches(step, options):
        step(batch, TABLE.read(batch.distinct))
    return step


def by_captured_step(options: UpdateOptions) -> TrainingStep:
    """Take the steps with a function that is called again in place of a CUDA graph."""
    step = TrainingStep(build(), RATES, CPU, options)
    captured = CapturedStep(step, capture=lambda run: run)
    for batch in scheduled_batches(step, options):
        padded = batch.padded(SHAPE)
        captured(padded, TABLE.read(padded.distinct))
    return step


FORMS = [pytest.param(by_cpu_fused_step, marks=needs_compiler), by_autograd, by_captured_step]


def by_pytorch(options: UpdateOptions) -> tuple[Recommender, dict[str, Tensor]]:
    """Train by PyTorch's own AdamW, without fusion; each parameter is a group. Return averages by hand too."""
    model = build()
    groups = model.parameter_groups()
    decayed = decayed_names(model)
    rate_of = {id(parameter): RATES[name] for name, parameters in groups.items() for parameter in parameters}
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight], "lr": rate_of[id(weight)], "weight_decay": options.weight_decay * (name in decayed)}
            for name, weight in model.named_parameters()
        ]
    )
    schedule = LambdaLR(optimizer, factor_of_half_a_wave if options.scheduled else lambda step: 1.0)
    averages = {name: value.clone() for name, value in weights(model).items()}
    for number, batch in enumerate(batches(), start=1):
        optimizer.zero_grad()
        model.loss(batch, TABLE.read(batch.distinct)).backward()
        if options.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            assert norm > options.clip_norm
        optimizer.step()
        schedule.step()
        decay = min(options.ema_decay, (1 + number) / (10 + number))
        for name, value in weights(model).items():
            averages[name] = decay * averages[name] + (1 - decay) * value
    return model, averages


def factor_of_half_a_wave(step: int) -> float:
    """Return the factor of a step for a warm-up of one and a half steps, and half a cosine wave over the others."""
    return 1 / 1.5 if step == 0 else 0.5 + 0.5 * np.cos(np.pi * max(step - 1.5, 0) / 2.5)


def decayed_names(model: Recommender) -> set[str]:
    """Return the names of the parameters that decay, by the names alone."""
    spared = ("bias", "gate", "norm.weight")
    return {name for name, _ in model.named_parameters() if not name.endswith(spared)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-11 * value.norm(), name


def weights(model: Recommender) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [DECAY, UpdateOptions(scheduled=True), CLIP, AVERAGE, ALL])
@pytest.mark.parametrize("trained", FORMS)
def test_updates_are_those_of_pytorch(trained: Callable[[UpdateOptions], CpuFusedStep | TrainingStep], options):
    step = trained(options)
    model, averages = by_pytorch(options)
    assert_close(weights(step.model), weights(model))
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    by_name = {names[parameter]: average for parameter, average in step.averages.items()}
    assert_close(by_name, averages if options.ema_decay else {})


@needs_compiler
def test_the_norm_does_not_depend_on_the_threads(threads_given_back):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        step = CpuFusedStep(build(), RATES, ALL)
        gradient = step.storage.gradient
        gradient.copy_(torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=gradient.dtype))
        step.storage.steps.fill_(1)
        calls = StepCalls(gradient.dtype, items=1, rows=1, encoded=1)
        adam = FlatAdamCalls(calls, step.storage.adam(), step.record)
        adam.update()
        calls.schedule.run()
        results.append(step.storage.parameters.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("trained", FORMS)
def test_a_loss_that_is_not_finite_changes_no_average(trained, monkeypatch):
    """From the third batch on, the table holds no numbers; these batches change nothing."""
    read = FeatureTable.read
    calls = itertools.count()
    numbers = [view.clone() for view in TABLE.views]

    def poisoned(self, items):
        if next(calls) == 2:
            for view in self.views:
                view.fill_(float("nan"))
        return read(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureTable, "read", poisoned)
        step = trained(ALL)
    for view, values in zip(TABLE.views, numbers):
        view.copy_(values)
    assert step.read().failed_step == 3
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 2)
    for (parameter, average), other in zip(step.averages.items(), trained(ALL).averages.items(), strict=True):
        assert torch.equal(parameter, other[0]) and torch.equal(average, other[1])


def test_averages_stand_in_a_model_for_a_while():
    parameters = [torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0)]
    averages = {parameter: -parameter.detach() for parameter in parameters}
    places = [parameter.data_ptr() for parameter in parameters]
    with pytest.raises(ZeroDivisionError), averaged_weights(averages):
        assert [parameter[0].item() for parameter in parameters] == [-1, -2]
        raise ZeroDivisionError
    assert [parameter[0].item() for parameter in parameters] == [1, 2]
    assert [parameter.data_ptr() for parameter in parameters] == places


@pytest.mark.parametrize(
    ("name", "value"), [("clip_norm", 0), ("clip_norm", float("inf")), ("ema_decay", 1), ("weight_decay", -1)]
)
def test_values_that_train_nothing_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}: expected"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("constant", [0.4, 0.8, 1, 1, 1, 1]),
        ("linear", [0.4, 0.8, 1, 1 - 0.5 / 3.5, 1 - 1.5 / 3.5, 1 - 2.5 / 3.5]),
        ("cosine", [0.4, 0.8, 1, *(0.5 + 0.5 * np.cos(np.pi * part / 3.5) for part in (0.5, 1.5, 2.5))]),
    ],
)
def test_rates_rise_in_the_warm_up_and_then_follow_the_schedule(kind, factors):
    """Check a run of two epochs of three steps, with a warm-up of five sixths of an epoch."""
    schedule = RateSchedule.of(TrainConfig(max_epochs=2, schedule=kind, warmup_epochs=5 / 6), steps_per_epoch=3)
    assert [schedule.factor(step) for step in range(6)] == pytest.approx(factors, rel=1e-14)


def test_without_a_warm_up_the_first_step_has_the_whole_rate_and_the_step_after_the_last_none():
    for kind in ("linear", "cosine"):
        schedule = RateSchedule(kind, warmup=0, steps=4)
        assert schedule.factor(0) == 1 and 0 < schedule.factor(3) < 0.3 and schedule.factor(4) == 0
    assert [RateSchedule("linear", warmup=2, steps=2).factor(step) for step in range(2)] == [0.5, 1]  # the whole run


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match=r"warmup_epochs: expected at most max_epochs \(3\), found 3\.5"):
        TrainConfig(max_epochs=3, warmup_epochs=3.5)


@pytest.mark.parametrize(
    "config", [SMALL, ModelConfig(embedding_dim=16, bottleneck=8, method="iisan-versa", sanb="phm", gates=False)]
)
def test_matrices_decay_and_biases_gates_and_norms_do_not(config):
    shapes = SHAPES if config is SMALL else [(4, 32), (3, 20)]  # iisan-versa then aligns the widths
    model = side_recommender(shapes, config, SEQUENCES.max_inputs, np.full(ITEMS + 1, 0.1), 1)
    decayed = {id(parameter) for parameter in model.decayed_parameters()}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in decayed} == decayed_names(model)
    assert len(decayed) == len(model.decayed_parameters()) and 0 < len(decayed) < len(list(model.parameters()))


def test_item_vectors_decay():
    def make() -> IdItemEncoder:
        return IdItemEncoder(ITEMS, 16)

    model = Recommender(make, ModelConfig("id", embedding_dim=16), 10, np.full(ITEMS + 1, 0.1), seed=0)
    assert any(parameter is model.item_encoder.embedding.weight for parameter in model.decayed_parameters())


def test_every_line_has_the_decay_of_its_parameter():
    model = build()
    storage = FlatStorage(model, RATES, options=DECAY)
    decayed = decayed_names(model)
    for name, parameter in model.named_parameters():
        line = (parameter.data_ptr() - storage.parameters.data_ptr()) // (8 * 32)
        assert storage.decays[storage.line_groups[line].long()] == (2.0 if name in decayed else 0.0), name
