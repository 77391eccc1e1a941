"""Adam's update on a CPU by C++: `cpp/adam.cpp`, all parameters in one call a core instead of one after the other."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .host import cores, cut
from .native import library, share_out

DTYPES = (torch.float32, torch.float64)
PARTS = 4  # a core


class AdamState(NamedTuple):
    """What Adam keeps of a parameter, and the parameter."""

    parameter: Tensor
    mean: Tensor  # exp_avg
    square: Tensor  # exp_avg_sq
    steps: Tensor  # taken so far: fp32 scalar


class AdamUpdate:
    """Updates parameters as torch.optim.Adam does without weight decay (Kingma and Ba 2015), in place."""

    def __init__(self, states: Sequence[AdamState]) -> None:
        """states: such as `takes` accepts."""
        self.states = states
        self._places = _places(states)
        self._parameters = (_Parameter * len(states))()
        for own, state in zip(self._parameters, states):
            own.values, own.mean, own.square, own.steps = (tensor.data_ptr() for tensor in state)
            own.count = state.parameter.numel()
        self._dtype = states[0].parameter.dtype
        self._library = library(self._dtype)

    def is_of(self, states: Sequence[AdamState]) -> bool:
        """Whether these are the same tensors, where they were."""
        return len(states) == len(self.states) and _places(states) == self._places

    def __call__(
        self, gradients: Sequence[Tensor], rates: Sequence[float], betas: tuple[float, float], epsilon: float
    ) -> None:
        """One step by each parameter's gradient and rate."""
        gradients = [gradient.contiguous() for gradient in gradients]
        for own, gradient, rate in zip(self._parameters, gradients, rates, strict=True):
            own.gradient, own.rate = gradient.data_ptr(), rate
        common = ctypes.addressof(self._parameters), len(self._parameters)
        total = sum(own.count for own in self._parameters)
        parts = [_Adam(*common, *share, *betas, epsilon) for share in cut(total, PARTS * cores())]
        share_out(self._library.adam_update, parts, self._dtype)
        self._library.adam_advance(ctypes.byref(parts[0]))
        for state in self.states:
            increment_version(state.parameter)  # so that a graph that saved it refuses to go back


def _places(states: Sequence[AdamState]) -> list[tuple[int, torch.dtype]]:
    """What is found anew where a tensor was given other memory, as by `module.to`."""
    return [(tensor.data_ptr(), tensor.dtype) for state in states for tensor in state]


def takes(states: Sequence[AdamState]) -> bool:
    """Whether the C++ knows these tensors: on a CPU, of one dtype, and their numbers one after the other."""
    dtype = states[0].parameter.dtype
    moments = [tensor for state in states for tensor in state[:3]]
    return (
        dtype in DTYPES
        and all(tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous() for tensor in moments)
        and all(state.steps.is_cpu and state.steps.dtype == torch.float32 for state in states)
    )


class _Parameter(ctypes.Structure):
    """`Parameter` of cpp/adam.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "gradient", "mean", "square", "steps")),
        ("count", ctypes.c_int64),
        ("rate", ctypes.c_double),
    ]


class _Adam(ctypes.Structure):
    """`Adam` of cpp/adam.cpp."""

    _fields_ = [
        ("parameters", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "start", "length")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "epsilon")),
    ]
