"""Dropout that depends on who and where, not on batching: every mask bit is a hash.

The hash takes (seed, step, site, user, position, channel), so padded, jagged, captured, resumed and multi-rank runs
draw the same masks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..types import SequenceDropout

MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B1


def sequence_dropout(probability: float, seed: int, step: int | Tensor, users: Tensor) -> SequenceDropout | None:
    """Return one step's dropout, or None if nothing drops.

    Args: step: the run's step number, an int or an int64 scalar, on the host or the masks' device; users int64 [users]:
    the numbers of the grid's users.
    """
    threshold = drop_threshold(probability)
    if not threshold:
        return None
    if isinstance(step, Tensor) and step.is_cpu:
        step = int(step)  # spares a dozen operators on one number
    return SequenceDropout(dropout_prefix(seed, step), threshold, 1 / (1 - probability), users)


def drop_threshold(probability: float) -> int:
    """Return the number of 2^32 hashes that drop."""
    return round(probability * 2**32)


def dropout_prefix(seed: int, step: int | Tensor | np.ndarray) -> int | Tensor | np.ndarray:
    """Return the hash of seed and step that a step's mask bits start from, 0 to 2^32 - 1; int64 arrays for int64."""
    return _absorb(_mix(seed & MASK32), step)


def drop_factors(
    dropout: SequenceDropout, sites: Tensor, users: Tensor, positions: Tensor, channels: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the factors of the values, 0 or 1 / (1 - probability), in `dtype`: [S, N, C].

    Args: sites int64 [S] tell apart the places in the model that drop; users, positions int64 [N]; channels int64 [C].
    """
    site = _absorb(dropout.prefix, sites[:, None])
    position = _absorb(_absorb(site, users), positions)  # [sites, N]
    stays = _absorb(position[..., None], channels) >= dropout.threshold
    return stays.to(dtype) * dropout.scale


def _mix(h):
    """Return a 32-bit finaliser (xor-shift, multiply) of an int or an int64 tensor holding unsigned 32-bit values."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & MASK32
    h = (h ^ (h >> 15)) * 0x846CA68B & MASK32
    return h ^ (h >> 16)


def _absorb(h, field):
    return _mix(h ^ (field * GOLDEN & MASK32))
