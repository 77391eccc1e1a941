"""Fold three linear maps into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Chain


def fold_heads(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """Return the weight [d, D] and the bias [d] of the one map that equals each chain."""
    return [(chain.outer @ chain.middle @ chain.inner, folded_bias(chain)) for chain in chains]


def folded_bias(chain: Chain) -> Tensor:
    """Return the bias [d] of the one map."""
    return chain.outer @ torch.addmv(chain.middle_bias, chain.middle, chain.inner_bias)
