"""One buffer for all trained parameters of a recommender, three more for their gradients and Adam's moments.

A step's kernels then read and write views at fixed addresses, and Adam's update is one pass over the buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..kernels import FLAT_ALIGNMENT, FLAT_LINE, FlatAdamState, RecommenderWeights
from ..models import Recommender

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as torch.optim has them


class FlatStorage:
    """A recommender's parameters, their gradients and Adam's state as views of flat buffers of one layout.

    The views stand in the order of `model.named_parameters()`; between them the buffers hold zeros. The model keeps its
    parameters, each with other memory and with its gradient, so that names in checkpoints stay. The storage is made
    once the model stands on its device: `check` refuses a model that was moved since. A deep copy of the model has
    memory of its own and no storage.
    """

    def __init__(
        self, model: Recommender, rates: Mapping[str, float], operand_dtype: torch.dtype | None = None
    ) -> None:
        """Move the model's parameters into the storage.

        Args: rates: learning rates by the names of `model.parameter_groups()`; operand_dtype: of a copy of the
        parameters for products, where that is not the parameters' own. Raises ValueError for parameters that are not of
        one dtype and device, or not all trained.
        """
        self.model, self._trained = model, list(model.parameters())
        first = self._trained[0]
        for name, parameter in model.named_parameters():
            if (parameter.dtype, parameter.device, parameter.requires_grad) != (first.dtype, first.device, True):
                expected = f"a trained parameter of {first.dtype} on {first.device}".replace("torch.", "")
                raise ValueError(f"{name}: expected {expected} in flat storage")
        sizes = [-(-parameter.numel() // FLAT_ALIGNMENT) * FLAT_ALIGNMENT for parameter in self._trained]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self.parameters, self.gradient, self.mean, self.square = (
            torch.zeros(self._starts[-1], dtype=first.dtype, device=first.device) for _ in range(4)
        )
        has_operands = operand_dtype not in (None, first.dtype)
        self.operand = self.parameters.to(operand_dtype) if has_operands else self.parameters
        self.steps = torch.zeros((), device=first.device)  # taken so far, fp32
        self._set_groups(rates)
        self._move_parameters()

    def _set_groups(self, rates: Mapping[str, float]) -> None:
        """Set each line's group, and each group's learning rate and weight decay."""
        groups = self.model.parameter_groups()
        number_of = {id(parameter): i for i, group in enumerate(groups.values()) for parameter in group}
        lines = torch.zeros(self._starts[-1] // FLAT_LINE, dtype=torch.uint8)
        for parameter, start, end in zip(self._trained, self._starts, self._starts[1:]):
            lines[start // FLAT_LINE : end // FLAT_LINE] = number_of[id(parameter)]
        device = self.parameters.device
        precision = torch.float64 if device.type == "cpu" else torch.float32  # a CPU computes with Python's numbers
        self.line_groups = lines.to(device)
        self.rates = torch.tensor([rates[name] for name in groups], dtype=precision, device=device)
        self.decays = torch.zeros_like(self.rates)

    def _move_parameters(self) -> None:
        """Copy the parameters' values into the storage, then give each parameter its view, gradient and state."""
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}  # as an optimizer's
        for i, parameter in enumerate(self._trained):
            value = self._view(self.parameters, i)
            value.copy_(parameter.detach())
            parameter.data, parameter.grad = value, self._view(self.gradient, i)
            moments = self._view(self.mean, i), self._view(self.square, i)
            self.state[parameter] = {"exp_avg": moments[0], "exp_avg_sq": moments[1], "step": self.steps}
        self._addresses = [parameter.data_ptr() for parameter in self._trained]
        self.refresh_operands()

    def refresh_operands(self) -> None:
        """Copy the parameters into the operands; to be called whenever something else than Adam's kernel wrote them."""
        if self.operand is not self.parameters:
            self.operand.copy_(self.parameters)

    def check(self) -> None:
        """Raise RuntimeError if a parameter no longer lies in the storage."""
        if [parameter.data_ptr() for parameter in self._trained] != self._addresses:
            raise RuntimeError("the model's parameters left their flat storage, as after model.to; make the step anew")

    def adam(self) -> FlatAdamState:
        """Return what Adam's kernel reads and writes."""
        buffers = self.parameters, self.gradient, self.mean, self.square
        return FlatAdamState(
            *buffers, self.line_groups, self.rates, self.decays, self.steps, betas=BETAS, epsilon=EPSILON
        )

    def weights(self) -> RecommenderWeights:
        """Return the parameters by their roles in a step, without graphs."""
        return self._roles(self.parameters)

    def operands(self) -> RecommenderWeights:
        """Return the products' operands by their roles: the parameters themselves, or in another dtype."""
        return self._roles(self.operand)

    def gradients(self) -> RecommenderWeights:
        """Return the gradients by the roles of their parameters."""
        return self._roles(self.gradient)

    def _roles(self, buffer: Tensor) -> RecommenderWeights:
        """Return a buffer's views by the roles of the parameters. Raises ValueError for a model without such roles."""
        numbers = {id(parameter): i for i, parameter in enumerate(self._trained)}
        return self.model.step_weights().mapped(lambda parameter: self._view(buffer, numbers[id(parameter)]))

    def _view(self, buffer: Tensor, number: int) -> Tensor:
        """Return the part of a buffer for the parameter of this number, in its shape."""
        parameter, start = self._trained[number], self._starts[number]
        return buffer[start : start + parameter.numel()].view(parameter.shape)
