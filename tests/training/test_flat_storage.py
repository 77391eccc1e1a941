"""Check that parameters, gradients and Adam's state are views of four buffers, and that checkpoints do not change."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.recommenders import side_recommender
from iisan_fast.config import ModelConfig
from iisan_fast.errors import InputError
from iisan_fast.kernels import FLAT_ALIGNMENT, FLAT_LINE
from iisan_fast.models.recommender import Recommender
from iisan_fast.training.checkpoints import (
    adam_tensors,
    load_adam,
    load_checkpoint,
    load_weights,
    named_weights,
    save_checkpoint,
)
from iisan_fast.training.flat_storage import FlatStorage
from iisan_fast.training.training_step import TrainingStep

CPU = torch.device("cpu")
RATES = {"adapters": 1e-4, "gates": 2e-4, "heads": 3e-4, "sequence_encoder": 4e-4}
SMALL = ModelConfig(embedding_dim=16, bottleneck=5)
PATH = Path("last.safetensors")


def build(config: ModelConfig = SMALL, seed: int = 1) -> Recommender:
    return side_recommender([(3, 20), (3, 20)], config, 10, np.full(9, 0.1), seed)


def addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_gradients_and_moments_are_views_of_one_layout(dtype):
    model = build().to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    storage = FlatStorage(model, RATES)
    starts = []
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
        moments = storage.state[parameter]
        offsets = [
            view.data_ptr() - buffer.data_ptr()
            for view, buffer in (
                (parameter, storage.parameters),
                (parameter.grad, storage.gradient),
                (moments["exp_avg"], storage.mean),
                (moments["exp_avg_sq"], storage.square),
            )
        ]
        assert len(set(offsets)) == 1 and offsets[0] % (FLAT_ALIGNMENT * dtype.itemsize) == 0
        assert all(view.is_contiguous() and view.shape == parameter.shape for view in (parameter, parameter.grad))
        starts.append(offsets[0])
    assert starts == sorted(set(starts)) and FLAT_ALIGNMENT * torch.bfloat16.itemsize == 128
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert storage.parameters.dtype == dtype and numbers < len(storage.parameters) <= numbers + 37 * FLAT_ALIGNMENT
    assert sum(map(Tensor.count_nonzero, before.values())) == storage.parameters.count_nonzero()


def test_every_line_has_the_rate_of_its_parameter():
    model = build()
    storage = FlatStorage(model, RATES)
    rates = storage.rates[storage.line_groups.long()].repeat_interleave(FLAT_LINE)
    assert len(rates) == len(storage.parameters) and storage.line_groups.dtype == torch.uint8
    groups = {id(parameter): name for name, group in model.parameter_groups().items() for parameter in group}
    for parameter in model.parameters():
        start = (parameter.data_ptr() - storage.parameters.data_ptr()) // 4
        assert (rates[start : start + parameter.numel()] == RATES[groups[id(parameter)]]).all()
    assert not storage.decays.any() and len(storage.decays) == len(storage.rates) == 4


def test_roles_are_views_of_their_buffers():
    model = build()
    storage = FlatStorage(model, RATES, torch.bfloat16)
    of_model = model.item_encoder.weights(model.sequence_encoder.weights())
    weights = storage.weights()
    operands = storage.operands()
    gradients = storage.gradients()
    assert addresses(weights.tensors()) == addresses(of_model.tensors())
    assert addresses(gradients.tensors()) == addresses([weight.grad for weight in of_model.tensors()])
    assert not any(tensor.requires_grad for tensor in weights.tensors())
    assert [tower.views for tower in operands.towers] == [(0,), (1,), (0, 1)]
    assert weights.activation == of_model.activation and gradients.sequence[1:] == of_model.sequence[1:]
    for operand, weight in zip(operands.tensors(), weights.tensors(), strict=True):
        assert operand.dtype == torch.bfloat16 and torch.equal(operand, weight.bfloat16())


def test_towers_without_gates_have_roles():
    storage = FlatStorage(build(ModelConfig(embedding_dim=16, bottleneck=5, gates=False)), RATES)
    assert all(tower.gate is None for tower in storage.gradients().towers)


def test_operands_are_refreshed():
    model = build()
    storage = FlatStorage(model, RATES, torch.bfloat16)
    with torch.no_grad():
        model.item_encoder.heads.fusion.bias.fill_(3)
    assert not torch.equal(storage.operand, storage.parameters.bfloat16())
    storage.refresh_operands()
    assert torch.equal(storage.operand, storage.parameters.bfloat16())
    assert (storage.operands().fusion_bias == 3).all()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_operands_of_the_parameters_dtype_are_the_parameters(dtype):
    storage = FlatStorage(build(), RATES, dtype)
    assert storage.operand is storage.parameters


def after_a_step(seed: int) -> tuple[Recommender, TrainingStep]:
    """Return a model and its optimizer in separate memory, after one update."""
    model = build(seed=seed)
    step = TrainingStep(model, RATES, CPU)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1)
    step.optimizer.step()
    return model, step


def test_a_checkpoint_of_separate_memory_is_loaded_into_the_views_and_saved_again(tmp_path):
    model, step = after_a_step(2)
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {**named_weights(model), **adam_tensors(model, step.optimizer)}, {"epoch": 1})
    stored, _ = load_checkpoint(path)
    loaded = build()
    storage = FlatStorage(loaded, RATES)
    load_weights(loaded, stored, path)
    load_adam(loaded, storage, stored, path)
    storage.check()
    assert storage.steps == 1 and storage.mean.any() and storage.square.any()
    assert all(state["step"] is storage.steps for state in storage.state.values())
    again = {**named_weights(loaded), **adam_tensors(loaded, storage)}
    save_checkpoint(path, again, {"epoch": 1})
    from_views, _ = load_checkpoint(path)
    assert from_views.keys() == stored.keys()
    assert all(torch.equal(tensor, from_views[name]) for name, tensor in stored.items())


def test_a_checkpoint_of_unequal_steps_is_refused():
    model, step = after_a_step(2)
    tensors = adam_tensors(model, step.optimizer)
    tensors["adam.step.sequence_encoder.position"] += 1
    storage = FlatStorage(build(), RATES)
    with pytest.raises(InputError, match=r"last\.safetensors: the optimizer's state .* after \[1\.0, 2\.0\] steps"):
        load_adam(storage.model, storage, tensors, PATH)
    assert not storage.mean.any() and not storage.steps


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_have_memory_of_their_own(again):
    model = build()
    storage = FlatStorage(model, RATES)
    model_copy = again(model)
    assert all(map(torch.equal, model_copy.parameters(), model.parameters()))
    with torch.no_grad():
        for parameter in model_copy.parameters():
            parameter.fill_(7)
    storage.check()
    assert not (storage.parameters == 7).any()
    FlatStorage(model_copy, RATES).check()


@pytest.mark.parametrize(
    "move",
    [lambda model: model.double(), lambda model: setattr(model.sequence_encoder.position, "data", torch.zeros(10, 16))],
)
def test_a_model_that_was_moved_is_refused(move):
    model = build()
    storage = FlatStorage(model, RATES)
    storage.check()
    move(model)
    with pytest.raises(RuntimeError, match="left their flat storage"):
        storage.check()


def test_parameters_that_are_not_trained_or_of_other_dtypes_are_refused():
    model = build()
    model.sequence_encoder.position.requires_grad_(False)
    with pytest.raises(ValueError, match=r"sequence_encoder\.position: expected a trained parameter of float32 on cpu"):
        FlatStorage(model, RATES)
    model = build()
    model.item_encoder.heads.fusion.double()
    with pytest.raises(ValueError, match=r"heads\.fusion\.weight: expected a trained parameter of float32"):
        FlatStorage(model, RATES)
    storage = FlatStorage(build(ModelConfig(embedding_dim=16, bottleneck=4, sanb="phm")), RATES)
    with pytest.raises(
        ValueError, match="expected one for a fused step, found that its towers' weights are products of others"
    ):
        storage.weights()
