"""Multiply chains of three linear maps into one map each: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Chain


def fold_heads(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """Return (outer middle inner [d, D], bias [d]) of each chain: one map that gives the same output as the three."""
    return [(chain.outer @ chain.middle @ chain.inner, folded_bias(chain)) for chain in chains]


def folded_bias(chain: Chain) -> Tensor:
    """Return outer (middle inner_bias + middle_bias), the bias [d] of a chain's one map."""
    return chain.outer @ torch.addmv(chain.middle_bias, chain.middle, chain.inner_bias)
