"""Check what may be added to Adam against PyTorch's own parts: weight decay, in every form of the step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.compiler import needs_compiler
from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.models.item_encoders import IdItemEncoder
from iisan_fast.models.recommender import Recommender
from iisan_fast.training.flat_storage import FlatStorage
from iisan_fast.training.fused_step import CpuFusedStep
from iisan_fast.training.training_step import CapturedStep, TrainingStep
from iisan_fast.training.update_options import UpdateOptions

CPU = torch.device("cpu")
SMALL = ModelConfig(embedding_dim=16, bottleneck=8)
SHAPES = [(3, 32), (3, 32)]
ITEMS = 40
RATES = {"adapters": 1e-2, "gates": 2e-2, "heads": 3e-3, "sequence_encoder": 4e-3}
STEPS = 4
DECAY = UpdateOptions(weight_decay=2.0)
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


def by_cpu_fused_step(options: UpdateOptions) -> CpuFusedStep:
    step = CpuFusedStep(build(), RATES, options)
    for batch in batches():
        step(batch, TABLE.read(batch.distinct))
    return step


def by_autograd(options: UpdateOptions) -> TrainingStep:
    step = TrainingStep(build(), RATES, CPU, options)
    for batch in batches():
        step(batch, TABLE.read(batch.distinct))
    return step


def by_captured_step(options: UpdateOptions) -> TrainingStep:
    """Take the steps with a function that is called again in place of a CUDA graph."""
    step = TrainingStep(build(), RATES, CPU, options)
    captured = CapturedStep(step, capture=lambda run: run)
    for batch in batches():
        padded = batch.padded(SHAPE)
        captured(padded, TABLE.read(padded.distinct))
    return step


FORMS = [pytest.param(by_cpu_fused_step, marks=needs_compiler), by_autograd, by_captured_step]


def by_pytorch(options: UpdateOptions) -> Recommender:
    """Train by PyTorch's own AdamW, without fusion; each parameter is a group."""
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
    for batch in batches():
        optimizer.zero_grad()
        model.loss(batch, TABLE.read(batch.distinct)).backward()
        optimizer.step()
    return model


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


@pytest.mark.parametrize("trained", FORMS)
def test_weight_decay_is_that_of_pytorch(trained: Callable[[UpdateOptions], CpuFusedStep | TrainingStep]):
    step = trained(DECAY)
    assert_close(weights(step.model), weights(by_pytorch(DECAY)))
    assert not torch.equal(step.model.sequence_encoder.position, by_pytorch(UpdateOptions()).sequence_encoder.position)


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
