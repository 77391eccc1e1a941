"""Measure the cost of training: TPME over time, parameters and memory, and memory by purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..errors import InputError

TPME_WEIGHTS = (0.45, 0.10, 0.45)  # of time, parameters and memory, as in the paper
WEIGHT_SUM_TOLERANCE = 1e-9  # the most by which the sum of the weights may differ from 1


def tpme(
    seconds: Mapping[str, float],
    parameters: Mapping[str, float],
    memory: Mapping[str, float],
    weights: Sequence[float] = TPME_WEIGHTS,
) -> dict[str, float]:
    """Return each method's training cost relative to the others, from 0 (least in all three) to 1 (most in all three).

    IISAN, equations 6 to 10: x~ = (x - min x) / (max x - min x) over the methods, for time T, trainable parameters P
    and peak memory M, and TPME = a1 T~ + a2 P~ + a3 M~ with a1 + a2 + a3 = 1. So the result depends on the methods that
    are compared. A figure that is the same for all methods adds 0 to each.

    seconds, parameters, memory: seconds of an epoch, trainable parameters and peak memory by method, in any unit.
    Raises InputError for less than two methods, for figures of different methods, for figures that are negative or not
    finite, and for weights that `check_weights` refuses.
    """
    check_weights(weights)
    if len(seconds) < 2:
        raise InputError(f"TPME compares methods: expected at least two, found {len(seconds)}")
    total = dict.fromkeys(seconds, 0.0)
    columns = {"seconds": seconds, "parameters": parameters, "memory": memory}
    for weight, (name, column) in zip(weights, columns.items()):
        if column.keys() != seconds.keys():
            raise InputError(f"TPME {name}: expected the methods {sorted(seconds)}, found {sorted(column)}")
        for method, share in _normalised(name, column).items():
            total[method] += weight * share
    return total


def check_weights(weights: Sequence[float]) -> None:
    """Raise InputError unless the TPME weights are three numbers, none negative, with the sum 1."""
    if (
        len(weights) != 3
        or not all(weight >= 0 for weight in weights)
        or not abs(sum(weights) - 1) <= WEIGHT_SUM_TOLERANCE
    ):
        raise InputError(f"TPME weights: expected three numbers from 0 that sum to 1, found {tuple(weights)}")


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Return the numbers of `trainable` and of `total` parameters; a shared parameter counts once."""
    counts = [(parameter.requires_grad, parameter.numel()) for parameter in module.parameters()]
    return {"trainable": sum(size for trained, size in counts if trained), "total": sum(size for _, size in counts)}


def memory_split(
    modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, activation_bytes: int
) -> dict[str, int]:
    """Return the bytes of weights, gradients, optimizer states and activations.

    Call this after a step's update, before its gradients are cleared. `trained_weights` are the parameters that require
    a gradient; `frozen_weights` are all other parameters and the buffers. What modules share counts once. An optimizer
    state counts if it is on the device of its parameter (Adam may keep its step counts on the host). activation_bytes:
    returned as `activations`.
    """
    whole = nn.ModuleList(modules)
    parameters = list(whole.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    return {
        "trained_weights": _bytes(trained),
        "frozen_weights": _bytes([*frozen, *whole.buffers()]),
        "gradients": _bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        "optimizer_states": _bytes(
            value
            for parameter, state in optimizer.state.items()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.device == parameter.device
        ),
        "activations": activation_bytes,
    }


def _normalised(name: str, column: Mapping[str, float]) -> dict[str, float]:
    """Return (x - min) / (max - min) of each method's figure; 0 if all are equal. Raises InputError for bad figures."""
    for method, value in column.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"TPME {name} of {method}: expected a finite number from 0, found {value}")
    least = min(column.values())
    most = max(column.values())
    return {method: (value - least) / (most - least) if most > least else 0.0 for method, value in column.items()}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the sum of the tensors' bytes."""
    return sum(tensor.nbytes for tensor in tensors)
