"""Keep all trained parameters of a recommender in one buffer, and their gradients and Adam's moments in three more.

So the kernels of a step read and write at fixed addresses, and Adam's update is one pass over the buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..kernels import FLAT_ALIGNMENT, FLAT_LINE, FlatAdamState, RecommenderWeights
from ..models import Recommender
from .update_options import PLAIN_ADAM, UpdateGroup, UpdateOptions, update_groups

BETAS = (0.9, 0.999)
EPSILON = 1e-8  # of Adam, the defaults of torch.optim
LOSS_SHARE = 2  # numbers behind the gradient: a rank's part of the loss, and its rows


class FlatStorage:
    """A recommender's parameters, their gradients and Adam's state as views of flat buffers with the same layout.

    The views are in the order of `model.named_parameters()`, with zeros between them. The model keeps its parameter
    objects; only their memory moves. So the names in checkpoints do not change. Make the storage when the model is on
    its device: `check` refuses a model that has moved since. A deep copy of the model is not in the storage.
    """

    def __init__(
        self,
        model: Recommender,
        rates: Mapping[str, float],
        operand_dtype: torch.dtype | None = None,
        options: UpdateOptions = PLAIN_ADAM,
    ) -> None:
        """Move the model's parameters into the storage.

        rates: learning rates by the names of `model.parameter_groups()`. operand_dtype: makes a second copy of the
        parameters in this dtype, for matrix products; None, or the parameters' dtype, makes none. options: of the
        update. Raises ValueError if the parameters are not of one dtype and device, or not all trained.
        """
        self.model = model
        self._trained = list(model.parameters())
        first = self._trained[0]
        for name, parameter in model.named_parameters():
            if (parameter.dtype, parameter.device, parameter.requires_grad) != (first.dtype, first.device, True):
                expected = f"a trained parameter of {first.dtype} on {first.device}".replace("torch.", "")
                raise ValueError(f"{name}: expected {expected} in flat storage")
        sizes = [-(-parameter.numel() // FLAT_ALIGNMENT) * FLAT_ALIGNMENT for parameter in self._trained]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self.parameters, self.mean, self.square = (
            torch.zeros(self._starts[-1], dtype=first.dtype, device=first.device) for _ in range(3)
        )
        # What ranks add up in one exchange: the gradient, and behind it a rank's part of the loss and its rows.
        self.summed = torch.zeros(self._starts[-1] + LOSS_SHARE, dtype=first.dtype, device=first.device)
        self.gradient, self.loss_share = self.summed.split([self._starts[-1], LOSS_SHARE])
        has_operands = operand_dtype not in (None, first.dtype)
        self.operand = self.parameters.to(operand_dtype) if has_operands else self.parameters
        self.steps = torch.zeros((), device=first.device)  # number of steps taken, float32
        self._set_groups(update_groups(model, rates, options))
        self._move_parameters()
        self._options = options
        # Averages of the parameters, in the same layout; None without them.
        self.average = self.parameters.clone() if options.ema_decay else None

    def _set_groups(self, groups: list[UpdateGroup]) -> None:
        """Set the group of each line of the buffers, and the learning rate and weight decay of each group."""
        number_of = {id(parameter): i for i, group in enumerate(groups) for parameter in group.parameters}
        lines = torch.zeros(self._starts[-1] // FLAT_LINE, dtype=torch.uint8)
        for parameter, start, end in zip(self._trained, self._starts, self._starts[1:]):
            lines[start // FLAT_LINE : end // FLAT_LINE] = number_of[id(parameter)]
        device = self.parameters.device
        precision = torch.float64 if device.type == "cpu" else torch.float32  # the CPU's form takes Python's numbers
        self.line_groups = lines.to(device)
        self.rates = torch.tensor([group.rate for group in groups], dtype=precision, device=device)
        self._full_rates = self.rates.clone()
        self.decays = torch.tensor([group.decay for group in groups], dtype=precision, device=device)

    def _move_parameters(self) -> None:
        """Copy the parameters into the storage, and give each parameter its view, its gradient and its state."""
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}  # as in an optimizer of PyTorch
        for i, parameter in enumerate(self._trained):
            value = self._view(self.parameters, i)
            value.copy_(parameter.detach())
            parameter.data = value
            parameter.grad = self._view(self.gradient, i)
            moments = self._view(self.mean, i), self._view(self.square, i)
            self.state[parameter] = {"exp_avg": moments[0], "exp_avg_sq": moments[1], "step": self.steps}
        self._addresses = [parameter.data_ptr() for parameter in self._trained]
        self.refresh_operands()

    def scale_rates(self, factor: float) -> None:
        """Set all learning rates to a factor of those of the settings, for the next steps.

        On a GPU the factor is an argument of one launch, after which a captured step reads the new rates.
        """
        torch.mul(self._full_rates, factor, out=self.rates)

    def refresh_operands(self) -> None:
        """Copy the parameters into the operands, after anything but Adam's kernel has changed the parameters."""
        if self.operand is not self.parameters:
            self.operand.copy_(self.parameters)

    def check(self) -> None:
        """Raise RuntimeError if a parameter's memory is no longer in the storage."""
        if [parameter.data_ptr() for parameter in self._trained] != self._addresses:
            raise RuntimeError("the model's parameters left their flat storage, as after model.to; make a new step")

    def adam(self) -> FlatAdamState:
        """Return the buffers and settings that Adam's kernel takes."""
        buffers = self.parameters, self.gradient, self.mean, self.square
        return FlatAdamState(
            *buffers,
            self.line_groups,
            self.rates,
            self.decays,
            self.steps,
            betas=BETAS,
            epsilon=EPSILON,
            clip_norm=self._options.clip_norm,
            averages=self.average,
            average_share=1 - self._options.ema_decay,
        )

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Return the average of each parameter, a view in the parameter's shape; empty without averages."""
        if self.average is None:
            return {}
        return {parameter: self._view(self.average, i) for i, parameter in enumerate(self._trained)}

    def weights(self) -> RecommenderWeights:
        """Return the parameters in their roles in a step, as views without autograd."""
        return self._roles(self.parameters)

    def operands(self) -> RecommenderWeights:
        """Return the operands of matrix products in their roles: the parameters, or their copy in another dtype."""
        return self._roles(self.operand)

    def gradients(self) -> RecommenderWeights:
        """Return the gradients in the roles of their parameters."""
        return self._roles(self.gradient)

    def _roles(self, buffer: Tensor) -> RecommenderWeights:
        """Return a buffer's views in the roles of the parameters. Raises ValueError if the model has no such roles."""
        numbers = {id(parameter): i for i, parameter in enumerate(self._trained)}
        return self.model.step_weights().mapped(lambda parameter: self._view(buffer, numbers[id(parameter)]))

    def _view(self, buffer: Tensor, number: int) -> Tensor:
        """Return the part of a buffer that belongs to the parameter of this number, in the parameter's shape."""
        parameter, start = self._trained[number], self._starts[number]
        return buffer[start : start + parameter.numel()].view(parameter.shape)
