"""Adam, by the fastest form that the parameters' device has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .checkpoint import ADAM_STATE


class Adam(torch.optim.Adam):
    """PyTorch's, fused, with its states and checkpoints; on a CPU updated in C++ where that runs the ops."""

    # Of the class: PyTorch's copies of an optimizer are made without __init__.
    found_inf: Tensor | None = None  # not 0: nothing is updated
    _update: kernels.AdamUpdate | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], device: torch.device) -> None:
        # Fused: one pass over the parameters in place of a dozen.
        super().__init__(groups, fused=True, capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. PyTorch's takes the first, which makes the states, and any that C++ does not know."""
        rates = {parameter: group["lr"] for group in self.param_groups for parameter in group["params"]}
        if closure is not None or not self._native(rates):
            return super().step(closure)
        if self.found_inf is None or not self.found_inf:
            gradients = [parameter.grad for parameter in rates]
            self._update(gradients, list(rates.values()), self.defaults["betas"], self.defaults["eps"])
        return None

    def _native(self, parameters: Collection[Tensor]) -> bool:
        """Whether C++ takes all parameters, their gradients and states as they are now."""
        if not all(each.is_cpu and each.grad is not None and self.state.get(each) for each in parameters):
            return False
        rules = {name: value for name, value in self.defaults.items() if name != "lr"}
        one_rule = all(all(group[name] == value for name, value in rules.items()) for group in self.param_groups)
        if not one_rule or rules["weight_decay"] or rules["amsgrad"] or getattr(self, "grad_scale", None) is not None:
            return False
        states = [kernels.AdamState(each, *(self.state[each][kind] for kind in ADAM_STATE)) for each in parameters]
        if self._update is None or not self._update.is_of(states):
            self._update = kernels.adam_update(states)
        return self._update is not None
