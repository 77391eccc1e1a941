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
        return None if closure is None and self._updated() else super().step(closure)

    def update(self) -> None:
        """`step` without hooks where C++ takes it."""
        if not self._updated():
            super().step()

    def _updated(self) -> bool:
        """Updates by C++, and says whether: it has to know all parameters, their gradients and states as they are."""
        rules, parameters = RULES(self.defaults), [each for group in self.param_groups for each in group["params"]]
        if any(RULES(group) != rules for group in self.param_groups) or any(rules[2:]) or self.grad_scale is not None:
            return False
        kept, gradients = list(map(self.state.get, parameters)), [each.grad for each in parameters]
        if not all(kept) or not all(each.is_cpu and own is not None for each, own in zip(parameters, gradients)):
            return False
        states = [(each, *map(state.__getitem__, ADAM_STATE)) for each, state in zip(parameters, kept)]
        if self._update is None or not self._update.is_of(states):
            self._update = kernels.adam_update([kernels.AdamState(*state) for state in states])
        if self._update is None:
            return False
        if self.found_inf is None or not self.found_inf:
            rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
            self._update(gradients, rates, *rules[:2])
        return True
