"""Checkpoints hold what is trained, and nothing of an encoder's frozen weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from iisan_fast.errors import InputError
from iisan_fast.training.checkpoints import adam_tensors, load_adam, load_weights, named_weights

PATH = Path("best.safetensors")


def partly_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}


def test_frozen_weights_are_neither_saved_nor_touched():
    model, other = partly_frozen(), partly_frozen()
    weights = saved(model)
    assert set(weights) == {"model.1.weight", "model.1.bias"}
    frozen = other[0].weight.clone()
    load_weights(other, {**weights, "item_vectors": torch.zeros(1)}, PATH)
    assert torch.equal(other[1].weight, model[1].weight) and torch.equal(other[0].weight, frozen)


def test_adams_state_of_what_is_trained_comes_back():
    model, other = partly_frozen(), partly_frozen()
    optimizers = [
        torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.1) for each in (model, other)
    ]
    for each, optimizer in zip((model, other), optimizers):
        each(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    tensors = adam_tensors(model, optimizers[0])
    assert set(tensors) == {
        f"adam.{kind}.1.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in ("weight", "bias")
    }
    load_adam(other, optimizers[1], tensors)
    again = adam_tensors(other, optimizers[1])
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.1.bias": None}, r"model\.1\.bias: expected \(2,\), found nothing"),
        ({"model.0.bias": torch.zeros(4)}, r"model\.0\.bias: expected nothing, found \(4,\)"),
        ({"model.1.weight": torch.zeros(2, 5)}, r"model\.1\.weight: expected \(2, 4\), found \(2, 5\)"),
    ],
)
def test_the_weights_of_another_model_are_refused(change, message):
    model = partly_frozen()
    weights = {name: tensor for name, tensor in {**saved(model), **change}.items() if tensor is not None}
    before = saved(model)
    with pytest.raises(InputError, match=rf"best\.safetensors: the weights of another model \({message}\)"):
        load_weights(model, weights, PATH)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved(model).items())
