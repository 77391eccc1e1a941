"""Adam's update on a CPU in C++ (`cpp/adam.cpp`): the numbers of all parameters are divided among the cores."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..checks import check_moments
from ..threads import cores, cut
from ..types import AdamState, FlatAdamState
from .library import DTYPES, library
from .schedule import Schedule, run
from .step_calls import StepCalls, addresses
from .structs import AdamParameterStruct, AdamStruct, FlatAdamStruct, SquareSumsStruct

PARTS = 4  # calls for each core
SUM_BLOCK = 8192  # numbers whose squares are added up together, as BLOCK in cpp/adam.cpp


def adam(states: Sequence[AdamState]) -> AdamUpdate:
    """Return the update of these parameters, to be called with gradients and rates once a step.

    `refusal` must return "" for them. The tensors must stay where they are as long as the update is used.
    """
    return AdamUpdate(states)


class AdamUpdate:
    """AdamW's step in place, equal to torch.optim.AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, states: Sequence[AdamState]) -> None:
        """Store the addresses of the parameters and moments, which must stay where they are (`is_of`).

        Raises ValueError if there are none, or if they do not fit together.
        """
        check_moments(states)
        if reason := refusal(states) if states else "expected at least one parameter":
            raise ValueError(f"states: {reason}")
        self.states = states
        self._places = _places(states)
        self._values = [state.parameter for state in states]
        self._parameters = (AdamParameterStruct * len(states))(
            *((*map(Tensor.data_ptr, state), *map(Tensor.numel, state[:3])) for state in states)
        )
        self._total = sum(parameter.numel() for parameter in self._values)
        self._dtype = states[0].parameter.dtype
        self._library = library(self._dtype)

    def is_of(self, states: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> bool:
        """Return True if (parameter, mean, square, steps) of each entry lie where this update's tensors lie."""
        return len(states) == len(self.states) and _places(states) == self._places

    def __call__(
        self,
        gradients: Sequence[Tensor],
        rates: Sequence[float],
        betas: tuple[float, float],
        epsilon: float,
        decays: Sequence[float] | None = None,
    ) -> None:
        """Update parameters, moments and step counts in place.

        Args:
            gradients: one for each parameter, of its shape and dtype, on a CPU.
            rates: the learning rate of each parameter.
            betas: decay rates of the first and second moment.
            epsilon: added to the denominator.
            decays: the weight decay of each parameter, which loses rate * decay of itself; None for no decay.

        Raises ValueError if gradients, rates or decays do not fit.
        """
        count = len(self.states)
        if not len(gradients) == len(rates) == count:
            raise ValueError(f"gradients, rates: expected {count} of each, found {len(gradients)} and {len(rates)}")
        if decays is None:
            decays = [0.0] * count
        if len(decays) != count:
            raise ValueError(f"decays: expected {count}, found {len(decays)}")
        for i, (gradient, value) in enumerate(zip(gradients, self._values)):
            if gradient.shape != value.shape:
                raise ValueError(f"gradients[{i}]: expected {list(value.shape)}, found {list(gradient.shape)}")
            if gradient.dtype != self._dtype or not gradient.is_cpu:
                message = f"gradients[{i}]: expected {self._dtype} on cpu, found {gradient.dtype} on {gradient.device}"
                raise ValueError(message.replace("torch.", ""))
        gradients = [gradient.contiguous() for gradient in gradients]
        pointers = (ctypes.c_void_p * count)(*map(Tensor.data_ptr, gradients))
        counts = (ctypes.c_int64 * count)(*map(Tensor.numel, gradients))
        scalars = [(ctypes.c_double * count)(*numbers) for numbers in (rates, decays)]
        arrays = self._parameters, pointers, *scalars, counts
        common = [*map(ctypes.addressof, arrays), count]
        parts = [AdamStruct(*common, *share, *betas, epsilon) for share in cut(self._total, PARTS * cores())]
        update = Schedule(self._dtype)
        update.add(self._library.adam_update, parts)
        # A graph that saved a parameter then refuses its backward, as after any change in place.
        update.run(meanwhile=lambda: increment_version(self._values))
        run(self._library.adam_advance, parts[0])


def _places(states: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[list[int], list[torch.dtype]]:
    """Return the addresses and dtypes of all tensors; they change when a module moves its parameters."""
    tensors = [tensor for state in states for tensor in state]
    return list(map(Tensor.data_ptr, tensors)), list(map(attrgetter("dtype"), tensors))


def refusal(states: Sequence[AdamState]) -> str:
    """Return why the C++ cannot update these tensors, or "" if it can."""
    dtype = states[0].parameter.dtype
    tensors = [tensor for state in states for tensor in state[:3]]
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        return "it needs parameters and moments of one dtype, float32 or float64"
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return "it needs contiguous parameters and moments on a CPU"
    if not all(state.steps.is_cpu and state.steps.dtype == torch.float32 for state in states):
        return "it needs step counts of float32 on a CPU"
    return ""


class FlatAdamCalls:
    """Adam's step on flat buffers, equal to torch.optim.AdamW. Each line of 32 numbers has one group.

    With a clip norm, gradients are scaled as by torch.nn.utils.clip_grad_norm_; the number of threads changes no bit.
    Averages, if there are any, follow the new parameters.

    If record[2] is not 0, a loss was not finite, and nothing is updated.
    """

    def __init__(self, calls: StepCalls, state: FlatAdamState, record: Tensor) -> None:
        """Prepare the calls; record float64 [4], as `StepTensors` has it."""
        self._calls = calls
        lines = len(state.line_groups)
        names = "values", "gradient", "mean", "square", "groups", "rates", "decays", "steps"
        places = dict(zip(names, addresses(state[: len(names)])), record=record.data_ptr())
        beta1, beta2 = state.betas
        more = dict(lines=lines, group_count=len(state.rates), beta1=beta1, beta2=beta2, epsilon=state.epsilon)
        if state.averages is not None:
            more |= dict(average=state.averages.data_ptr(), average_share=state.average_share)
        self._sums = torch.empty(0, dtype=torch.float64)  # of the gradient's squares, by block
        if state.clip_norm is not None:
            self._sums = torch.empty(-(-len(state.gradients) // SUM_BLOCK), dtype=torch.float64)
            more |= dict(square_sums=self._sums.data_ptr(), sum_count=len(self._sums), clip_norm=state.clip_norm)
        self._squares = [
            SquareSumsStruct(state.gradients.data_ptr(), self._sums.data_ptr(), len(state.gradients), start, length)
            for start, length in cut(len(self._sums), PARTS * cores())
            if length
        ]
        self._structs = [
            FlatAdamStruct(**places, **more, start=start, length=length)
            for start, length in cut(lines, PARTS * cores())
        ]

    def update(self) -> None:
        """Schedule the update of the parameters and the moments, with the gradients in the state's buffer."""
        squared = self._calls.add("square_sums", self._squares)
        self._calls.add("adam_update_lines", self._structs, squared)
