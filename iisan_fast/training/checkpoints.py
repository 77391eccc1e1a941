"""Checkpoints: weights, optimizer state and a little JSON in one safetensors file that is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import whole_file

ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors, and state as JSON in the file's metadata; an older file is replaced at once or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:  # not through memory, where it would stand twice more
        safetensors.torch.save_file(contiguous, temporary, metadata={"state": json.dumps(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) of a checkpoint. Raises InputError if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, state
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (safetensors.SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a checkpoint of this program, or damaged ({error})") from None


def adam_tensors(model: nn.Module, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state of what is trained, as named tensors: adam.<kind>.<parameter's name>."""
    return {
        f"adam.{kind}.{name}": optimizer.state[parameter][kind]
        for name, parameter in _trained(model).items()
        for kind in ADAM_STATE
    }


def load_adam(model: nn.Module, optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    """Puts `adam_tensors` back."""
    for name, parameter in _trained(model).items():
        for kind in ADAM_STATE:
            optimizer.state[parameter][kind] = tensors[f"adam.{kind}.{name}"].to(parameter.device)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Puts `named_weights` back. Raises InputError, naming the file, where they are those of another model."""
    weights = named_weights(model)
    expected = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("model.")}
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{path}: the weights of another model ({name}: expected {expected.get(name, 'nothing')}, "
                f"found {found.get(name, 'nothing')})"
            )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What of the model is trained, under the names that checkpoints use; the rest comes from the encoders' files."""
    return {f"model.{name}": parameter for name, parameter in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
