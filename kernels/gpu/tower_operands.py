"""The operands of the towers' kernels, made from the towers' parameters by plain differentiable operations."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.side_towers import GATE_TEMPERATURE
from ..types import Tower


def tower_operands(
    towers: Sequence[Tower], first_towers: int, second_towers: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return what the kernels read, computed from the towers' parameters and differentiable in them.

    In fp32: coefficients [T, K, 3] (carry, first's and second's weight), down [T, K, R, D], bias [T, K, R],
    composites [T, K, R, K, R] (zero unless the second layer lies below the first), up [T, K, R, D], up_bias [T, D].
    """
    down = torch.stack([tower.down_weight for tower in towers]).float()
    up = torch.stack([tower.up_weight.mT for tower in towers]).float().contiguous()
    down_bias = torch.stack([tower.down_bias for tower in towers]).float()
    up_bias = torch.stack([tower.up_bias for tower in towers]).float()
    count, layers, bottleneck, width = down.shape
    constant = _constants(count, first_towers, second_towers, layers, down.device)
    if towers[0].gate is None:
        coefficients, carry = constant.plain, constant.at_or_below.expand(count, -1, -1)
    else:
        logits = torch.stack([tower.gate for tower in towers]).float() / GATE_TEMPERATURE
        coefficients = constant.base + constant.slope * torch.sigmoid(logits)[..., None]
        log_carry = constant.is_intra * F.logsigmoid(-logits)
        carry = (constant.between * log_carry[:, None, None, :]).sum(3).exp() * constant.at_or_below
    below = carry * constant.below
    flat = (count, layers * bottleneck, width)
    product_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # fp16 gradients would underflow here
    composites = torch.matmul(down.to(product_dtype).view(flat), up.to(product_dtype).view(flat).mT)
    composites = composites.view(count, layers, bottleneck, layers, bottleneck) * below[:, :, None, :, None]
    through_bias = torch.matmul(down.view(flat), up_bias.mT).view(count, layers, bottleneck, layers)
    final = carry[:, -1, :, None]
    return (
        coefficients,
        down,
        down_bias + (through_bias * below[:, :, None, :]).sum(3),
        composites,
        up * final[..., None],
        (up_bias * final).sum(1),
    )


class _Constants:
    """Tensors that depend on the towers' kinds and depth alone, made on the device (the host copies nothing)."""

    def __init__(self, towers: int, first_towers: int, second_towers: int, layers: int, device: torch.device) -> None:
        tower, k = torch.arange(towers, device=device), torch.arange(layers, device=device)
        first, second = (((readers >> tower) & 1).float()[:, None] for readers in (first_towers, second_towers))
        both, one = first * second, torch.ones_like(first)
        self.is_intra = one - both
        # alone: carry 1 - g, weight g; both: carry 1, first g, second 1 - g
        self.base = torch.stack([one, 0 * one, both], dim=2)
        self.slope = torch.stack([-self.is_intra, first, self.is_intra * second - both], dim=2)
        self.plain = torch.stack([one, first, second], dim=2).expand(-1, layers, -1)
        self.below = (k[:, None] > k).float()  # [k, j]: layer j lies below layer k
        self.at_or_below = (k[:, None] >= k).float()
        i = k[None, None, :]
        self.between = ((i > k[None, :, None]) & (i <= k[:, None, None])).float()  # [k, j, i]: j < i <= k


@functools.lru_cache(maxsize=32)
def _constants(towers: int, first_towers: int, second_towers: int, layers: int, device: torch.device) -> _Constants:
    with torch.inference_mode(False):  # a first call in inference must not keep later ones from being trained
        return _Constants(towers, first_towers, second_towers, layers, device)
