"""Adam, by the fastest form that the parameters' device has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .checkpoints import ADAM_STATE

RULES = itemgetter("betas", "eps", "weight_decay", "amsgrad", "maximize")  # C++ knows the first two


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam, with its states and checkpoints; on a CPU, C++ takes the updates where it runs the ops."""

    # Of the class: PyTorch's copies of an optimizer are made without __init__.
    found_inf: Tensor | None = None  # not 0: nothing is updated
    grad_scale: Tensor | None = None  # gradients are that many times too large
    _update: kernels.AdamUpdate | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], device: torch.device) -> None:
        # Fused: one pass over the parameters in place of a dozen.
        super().__init__(groups, fused=True, capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters: by PyTorch at first, which makes the states, and where C++ does not know them."""
        return None if closure is None and self._updated() else super().step(closure)

    def update(self) -> None:
        """Update the parameters as `step` does, without hooks where C++ does it."""
        if not self._updated():
            super().step()

    def _updated(self) -> bool:
        """Update by C++ and return True, or return False where it does not know the parameters, gradients or states."""
        rules, parameters = RULES(self.defaults), [weight for group in self.param_groups for weight in group["params"]]
        if any(RULES(group) != rules for group in self.param_groups) or any(rules[2:]) or self.grad_scale is not None:
            return False
        moments, gradients = list(map(self.state.get, parameters)), [weight.grad for weight in parameters]
        if (
            not all(moments)
            or any(not weight.is_cpu for weight in parameters)
            or any(grad is None for grad in gradients)
        ):
            return False
        states = [(weight, *map(state.__getitem__, ADAM_STATE)) for weight, state in zip(parameters, moments)]
        if self._update is None or not self._update.is_of(states):
            self._update = kernels.adam([kernels.AdamState(*state) for state in states])
        if self._update is None:
            return False
        if self.found_inf is None or not self.found_inf:
            rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
            self._update(gradients, rates, *rules[:2])
        return True
