"""Compute the operands of the towers' kernels from the towers' parameters by differentiable PyTorch operations."""

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
    """Return the kernels' operands (side_towers.py has the equations), differentiable in the towers' parameters.

    Args: towers of one shape; first_towers, second_towers: bit t is set if tower t reads that view; dtype: of the
    matrix products.

    Returns six fp32 tensors: coefficients [T, K, 3] (carry, weight of the first view, weight of the second view), down
    [T, K, R, D], bias [T, K, R], composites [T, K, R, K, R] (0 unless the second layer lies below the first), up
    [T, K, R, D] and up_bias [T, D], both times the carries of the layers above.
    """
    down = torch.stack([tower.down_weight for tower in towers]).float()
    up = torch.stack([tower.up_weight.mT for tower in towers]).float().contiguous()
    down_bias = torch.stack([tower.down_bias for tower in towers]).float()
    up_bias = torch.stack([tower.up_bias for tower in towers]).float()
    count, layers, bottleneck, width = down.shape
    constant = _constants(count, first_towers, second_towers, layers, down.device)
    if towers[0].gate is None:
        coefficients = constant.plain
        carry = constant.at_or_below.expand(count, -1, -1)
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
    """Constant tensors for towers that read these views, with this number of layers, computed on the device."""

    def __init__(self, towers: int, first_towers: int, second_towers: int, layers: int, device: torch.device) -> None:
        """Compute the constants; bit t of first_towers, second_towers is set if tower t reads that view."""
        tower, k = torch.arange(towers, device=device), torch.arange(layers, device=device)
        first, second = (((readers >> tower) & 1).float()[:, None] for readers in (first_towers, second_towers))
        both = first * second
        one = torch.ones_like(first)
        self.is_intra = one - both
        # one view: carry 1 - g, weight g; two views: carry 1, first g, second 1 - g
        self.base = torch.stack([one, 0 * one, both], dim=2)
        self.slope = torch.stack([-self.is_intra, first, self.is_intra * second - both], dim=2)
        self.plain = torch.stack([one, first, second], dim=2).expand(-1, layers, -1)
        self.below = (k[:, None] > k).float()  # [k, j]: layer j lies below layer k
        self.at_or_below = (k[:, None] >= k).float()
        i = k[None, None, :]
        self.between = ((i > k[None, :, None]) & (i <= k[:, None, None])).float()  # [k, j, i]: j < i <= k


@functools.lru_cache(maxsize=32)
def _constants(towers: int, first_towers: int, second_towers: int, layers: int, device: torch.device) -> _Constants:
    """Return the cached constants."""
    with torch.inference_mode(False):  # tensors made in inference mode could not be used in training later
        return _Constants(towers, first_towers, second_towers, layers, device)
