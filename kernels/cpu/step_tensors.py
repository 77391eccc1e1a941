"""Check the tensors of a training step before C++ gets their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import FLAT_LINE, FlatAdamState, StepTensors


def check_step_tensors(tensors: StepTensors) -> None:
    """Raise ValueError unless gradients, Adam's buffers and the record have the sizes and dtypes of `StepTensors`.

    The weights are those for which the step's `refusal` returns "". All tensors must be contiguous, on a CPU.
    """
    weights = tensors.weights.tensors()
    gradients = tensors.gradients.tensors()
    if len(gradients) != len(weights):
        raise ValueError(f"gradients: expected {len(weights)}, one of each weight, found {len(gradients)}")
    dtype = tensors.weights.fusion.dtype
    for i, (gradient, weight) in enumerate(zip(gradients, weights)):
        check_tensor(f"gradients[{i}]", gradient, dtype, weight.shape)
    check_tensor("record", tensors.record, torch.float64, (4,))
    check_tensor("loss", tensors.loss, dtype, ())
    if tensors.loss_share is not None:
        check_tensor("loss_share", tensors.loss_share, dtype, (2,))
    _check_flat(tensors.adam, dtype)


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raise ValueError, with the argument's name, unless a tensor is contiguous on a CPU, of this dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != tuple(shape) or not tensor.is_cpu or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        expected = f"contiguous {dtype_name(dtype)} {list(shape)} on cpu"
        description = f"{dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}{layout}"
        raise ValueError(f"{name}: expected {expected}, found {description}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _check_flat(adam: FlatAdamState, dtype: torch.dtype) -> None:
    """Raise ValueError unless all buffers have one size, a group for each line, and each group a rate and a decay."""
    numbers = len(adam.line_groups) * FLAT_LINE
    for name in ("parameters", "gradients", "means", "squares"):
        check_tensor(f"adam.{name}", getattr(adam, name), dtype, (numbers,))
    if adam.averages is not None:
        check_tensor("adam.averages", adam.averages, dtype, (numbers,))
    check_tensor("adam.line_groups", adam.line_groups, torch.uint8, (len(adam.line_groups),))
    for name in ("rates", "decays"):
        check_tensor(f"adam.{name}", getattr(adam, name), torch.float64, (len(adam.rates),))
    check_tensor("adam.steps", adam.steps, torch.float32, ())
