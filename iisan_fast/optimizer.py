"""Adam, by the fastest form that the parameters' device has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .checkpoint import ADAM_STATE

RULES = itemgetter("betas", "eps", "weight_decay", "amsgrad", "maximize")  # C++ knows the first two


class Adam(torch.optim.Adam):
    """PyTorch's, fused, with its states and checkpoints; on a CPU updated in C++ where that runs the ops."""

    # Of the class: PyTorch's copies of an optimizer are made without __init__.
    found_inf: Tensor | None = None  # not 0: nothing is updated
    grad_scale: Tensor | None = None  # gradients are that many times too large
    _update: kernels.AdamUpdate | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], device: torch.device) -> None:
        # Fused: one pass over the parameters in place of a dozen.
        super().__init__(groups, fused=True, capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. PyTorch's takes the first, which makes the states, and any that C++ does not know."""
        parameters = [each for group in self.param_groups for each in group["params"]]
        if closure is not None or not self._native(parameters):
            return super().step(closure)
        if self.found_inf is None or not self.found_inf:
            rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
            gradients = [parameter.grad for parameter in parameters]
            self._update(gradients, rates, self.defaults["betas"], self.defaults["eps"])
        return None

    def _native(self, parameters: Sequence[Tensor]) -> bool:
        """Whether C++ takes all parameters, their gradients and states as they are now."""
        rules = RULES(self.defaults)
        if any(RULES(group) != rules for group in self.param_groups) or any(rules[2:]) or self.grad_scale is not None:
            return False
        kept = list(map(self.state.get, parameters))
        if not all(kept) or not all(each.is_cpu and each.grad is not None for each in parameters):
            return False
        states = [(each, *map(state.__getitem__, ADAM_STATE)) for each, state in zip(parameters, kept)]
        if self._update is None or not self._update.is_of(states):
            self._update = kernels.adam_update([kernels.AdamState(*state) for state in states])
        return self._update is not None
