"""Check that checkpoints hold what is trained, and no frozen weights of an encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from iisan_fast.errors import InputError
from iisan_fast.training.checkpoints import (
    adam_tensors,
    item_vectors,
    load_adam,
    load_checkpoint,
    load_weights,
    named_weights,
)

PATH = Path("best.safetensors")


def partly_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}


def test_frozen_weights_are_neither_saved_nor_touched():
    model, loaded = partly_frozen(), partly_frozen()
    weights = saved(model)
    assert set(weights) == {"model.1.weight", "model.1.bias"}
    frozen = loaded[0].weight.clone()
    load_weights(loaded, {**weights, "item_vectors": torch.zeros(1)}, PATH)
    assert torch.equal(loaded[1].weight, model[1].weight) and torch.equal(loaded[0].weight, frozen)


def test_adams_state_of_what_is_trained_comes_back():
    model, loaded = partly_frozen(), partly_frozen()
    optimizers = [
        torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.1) for module in (model, loaded)
    ]
    for module, optimizer in zip((model, loaded), optimizers):
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    tensors = adam_tensors(model, optimizers[0])
    assert set(tensors) == {
        f"adam.{kind}.1.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in ("weight", "bias")
    }
    load_adam(loaded, optimizers[1], tensors, PATH)
    again = adam_tensors(loaded, optimizers[1])
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.1.bias": None}, r"model\.1\.bias: expected \(2,\) of float32, found nothing"),
        ({"model.0.bias": torch.zeros(4)}, r"model\.0\.bias: expected nothing, found \(4,\) of float32"),
        (
            {"model.1.weight": torch.zeros(2, 5)},
            r"model\.1\.weight: expected \(2, 4\) of float32, found \(2, 5\) of float32",
        ),
        ({"model.1.bias": torch.zeros(2).double()}, r"model\.1\.bias: expected \(2,\) of float32, found .* float64"),
    ],
)
def test_the_weights_of_another_model_are_refused(change, message):
    model = partly_frozen()
    weights = {name: tensor for name, tensor in {**saved(model), **change}.items() if tensor is not None}
    before = saved(model)
    with pytest.raises(InputError, match=rf"best\.safetensors: the weights of another model \({message}\)"):
        load_weights(model, weights, PATH)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved(model).items())


def stepped() -> tuple[nn.Sequential, torch.optim.Adam]:
    """Return a model, and its optimizer after one step."""
    model = partly_frozen()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adam.exp_avg.1.weight", torch.zeros(1), r"expected \(2, 4\) of float32, found \(1,\) of float32"),
        ("adam.exp_avg_sq.1.bias", torch.zeros(4)[:3], r"expected \(2,\) of float32, found \(3,\) of float32"),
        ("adam.step.1.bias", torch.zeros(2), r"expected \(\) of float32, found \(2,\) of float32"),
        ("adam.exp_avg.1.bias", torch.zeros(2).double(), r"expected \(2,\) of float32, found \(2,\) of float64"),
        ("adam.exp_avg.1.bias", None, r"expected \(2,\) of float32, found nothing"),
        ("adam.exp_avg.0.bias", torch.zeros(4), r"expected nothing, found \(4,\) of float32"),
    ],
)
def test_a_state_of_adam_that_does_not_fit_is_refused_and_changes_nothing(name, change, message):
    model, optimizer = stepped()
    tensors = {key: tensor.clone() for key, tensor in adam_tensors(model, optimizer).items()}
    changed = {key: tensor for key, tensor in {**tensors, name: change}.items() if tensor is not None}
    with pytest.raises(
        InputError, match=rf"best\.safetensors: the optimizer's state of another model \({name}: {message}"
    ):
        load_adam(model, optimizer, changed, PATH)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adam_tensors(model, optimizer).items())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adam.step.1.bias", torch.tensor(9.0), "has parameters after"),
        ("adam.exp_avg_sq.1.bias", torch.tensor([0.5, -1e-9]), "expected squares, found numbers below 0"),
    ],
)
def test_impossible_numbers_of_adam_are_refused_and_change_nothing(name, change, message):
    model, optimizer = stepped()
    tensors = {key: tensor.clone() for key, tensor in adam_tensors(model, optimizer).items()}
    with pytest.raises(InputError, match=message):
        load_adam(model, optimizer, {**tensors, name: change}, PATH)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adam_tensors(model, optimizer).items())


@pytest.mark.parametrize("vectors", [None, torch.zeros(3, 5), torch.zeros(4, 5).double()])
def test_item_vectors_of_another_shape_are_refused(vectors):
    tensors = {} if vectors is None else {"item_vectors": vectors}
    with pytest.raises(InputError, match=r"item_vectors: expected \(4, 5\) of float32, found"):
        item_vectors(tensors, 4, 5, PATH)


@pytest.mark.parametrize("state", [[], {}, {"epoch": "2"}, {"epoch": -1}, {"epoch": True}, 3, None])
def test_a_checkpoint_without_an_epoch_is_named(tmp_path, state):
    metadata = {"state": json.dumps(state)}
    save_file({"weight": torch.zeros(2)}, tmp_path / "last.safetensors", metadata=metadata)
    with pytest.raises(
        InputError,
        match=r"last\.safetensors: .*(expected the state of a checkpoint with its epoch|expected a JSON object)",
    ):
        load_checkpoint(tmp_path / "last.safetensors")
