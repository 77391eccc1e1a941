"""Define AdamW, updated by the fastest form for the parameters' device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .checkpoints import ADAM_STATE

RULES = itemgetter("betas", "eps", "amsgrad", "maximize")  # the C++ form supports the first two


class Adam(torch.optim.AdamW):
    """PyTorch's fused AdamW, with its states and checkpoints. On a CPU, the C++ form of the op updates if it can."""

    # Class attributes, because PyTorch copies an optimizer without __init__.
    found_inf: Tensor | None = None  # if not 0, nothing is updated
    grad_scale: Tensor | None = None  # the factor by which gradients are too large
    _update: kernels.AdamUpdate | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], device: torch.device) -> None:
        """Make the optimizer. groups: dicts with "params", "lr" and "weight_decay", as PyTorch takes them."""
        # Fused: one pass over the parameters instead of a dozen.
        super().__init__(groups, weight_decay=0, fused=True, capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters. PyTorch makes the first update, with the states, and each that C++ cannot make.

        closure: as in PyTorch; its result is returned, None without one.
        """
        return None if closure is None and self._updated() else super().step(closure)

    def update(self) -> None:
        """Update the parameters as `step` does, but without PyTorch's step hooks if C++ makes the update."""
        if not self._updated():
            super().step()

    def _updated(self) -> bool:
        """Update by C++ and return True; return False if C++ cannot take the parameters, gradients or states."""
        rules = RULES(self.defaults)
        parameters = [weight for group in self.param_groups for weight in group["params"]]
        if any(RULES(group) != rules for group in self.param_groups) or any(rules[2:]) or self.grad_scale is not None:
            return False
        moments = list(map(self.state.get, parameters))
        gradients = [weight.grad for weight in parameters]
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
            settings = [(group["lr"], group["weight_decay"]) for group in self.param_groups for _ in group["params"]]
            rates, decays = zip(*settings)
            self._update(gradients, rates, *rules[:2], decays)
        return True
