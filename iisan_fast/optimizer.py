"""Adam, by the fastest form that the parameters' device has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import kernels

KINDS = ("exp_avg", "exp_avg_sq", "step")  # what PyTorch's keeps of a parameter


class Adam(torch.optim.Adam):
    """PyTorch's, fused, with its states and checkpoints; on a CPU updated in C++ where that runs the ops."""

    def __init__(self, groups: Iterable[dict[str, Any]], device: torch.device) -> None:
        # Fused: one pass over the parameters in place of a dozen.
        super().__init__(groups, fused=True, capturable=device.type == "cuda")
        self.device = device
        self.found_inf: Tensor | None = None  # not 0: nothing is updated
        self._states: list[kernels.AdamState] = []
        self._update: kernels.AdamUpdate | None = None  # of these states

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. PyTorch's takes the first, which makes the states, and any that leaves parameters out."""
        rates = {parameter: group["lr"] for group in self.param_groups for parameter in group["params"]}
        gradients = [parameter.grad for parameter in rates]
        if closure is not None or any(gradient is None for gradient in gradients) or not self._native(rates):
            return super().step(closure)
        if self.found_inf is None or not self.found_inf:
            self._update(gradients, list(rates.values()), self.defaults["betas"], self.defaults["eps"])
        return None

    def _native(self, parameters: Iterable[Tensor]) -> bool:
        """Whether C++ takes the parameters and their states, which may have come from a checkpoint since."""
        if self.device.type != "cpu":
            return False
        own = [(parameter, self.state.get(parameter)) for parameter in parameters]
        if not all(state for _, state in own):
            return False
        states = [kernels.AdamState(each, *(state[kind] for kind in KINDS)) for each, state in own]
        if len(states) != len(self._states) or not all(map(_same, states, self._states)):
            self._states, self._update = states, kernels.adam_update(states)
        return self._update is not None


def _same(state: kernels.AdamState, other: kernels.AdamState) -> bool:
    return all(tensor is own for tensor, own in zip(state, other))
