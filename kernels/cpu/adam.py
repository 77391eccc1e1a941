"""Adam's update on a CPU by C++: `cpp/adam.cpp`, all parameters in one call a core instead of one after the other."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..threads import cores, cut
from .library import DTYPES, Schedule, library

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
        self.states, self._places = states, _places(states)
        self._values = [state.parameter for state in states]
        self._parameters = (_Parameter * len(states))(
            *((*(tensor.data_ptr() for tensor in state), state.parameter.numel()) for state in states)
        )
        self._total = sum(parameter.numel() for parameter in self._values)
        self._dtype = states[0].parameter.dtype
        self._library = library(self._dtype)

    def is_of(self, states: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> bool:
        """Whether these are the same tensors, where they were."""
        return len(states) == len(self.states) and _places(states) == self._places

    def __call__(
        self, gradients: Sequence[Tensor], rates: Sequence[float], betas: tuple[float, float], epsilon: float
    ) -> None:
        """One step by each parameter's gradient and rate. Raises ValueError where one has none."""
        count = len(self.states)
        if not len(gradients) == len(rates) == count:
            raise ValueError(f"gradients, rates: expected {count} of each, found {len(gradients)} and {len(rates)}")
        gradients = [gradient.contiguous() for gradient in gradients]
        pointers = (ctypes.c_void_p * count)(*(gradient.data_ptr() for gradient in gradients))
        arrays = self._parameters, pointers, (ctypes.c_double * count)(*rates)
        common = [*map(ctypes.addressof, arrays), count]
        parts = [_Adam(*common, *share, *betas, epsilon) for share in cut(self._total, PARTS * cores())]
        update = Schedule(self._dtype)
        update.add(self._library.adam_update, parts)
        # So that a graph that saved one of them refuses to go back.
        update.run(meanwhile=lambda: increment_version(self._values))
        self._library.adam_advance(ctypes.byref(parts[0]))


def _places(states: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[list[int], list[torch.dtype]]:
    """What is found anew where a tensor was given other memory, as by `module.to`."""
    tensors = [tensor for state in states for tensor in state]
    return list(map(Tensor.data_ptr, tensors)), list(map(attrgetter("dtype"), tensors))


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
        *((name, ctypes.c_void_p) for name in ("values", "mean", "square", "steps")),
        ("count", ctypes.c_int64),
    ]


class _Adam(ctypes.Structure):
    """`Adam` of cpp/adam.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("parameters", "gradients", "rates")),
        *((name, ctypes.c_int64) for name in ("count", "start", "length")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "epsilon")),
    ]
