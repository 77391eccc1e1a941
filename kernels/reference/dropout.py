"""Stateless dropout: a hash of (seed, step, site, user, position, channel) decides each mask bit.

The masks do not depend on the layout of the batch, so padded, jagged, captured, resumed and multi-rank runs draw the
same masks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..types import SequenceDropout

MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B1


def sequence_dropout(probability: float, seed: int, step: int | Tensor, users: Tensor) -> SequenceDropout | None:
    """Return the dropout of one step, or None if the probability rounds to 0.

    Args:
        probability: share of numbers to drop, from 0 to below 1.
        seed: the run's seed; its low 32 bits count.
        step: number of the step in the run, an int or an int64 scalar on the host or on the device of the masks.
        users: int64 [users], the numbers of the grid's users, which enter the hash.
    """
    threshold = drop_threshold(probability)
    if not threshold:
        return None
    if isinstance(step, Tensor) and step.is_cpu:
        step = int(step)  # saves a dozen tensor operators on one number
    return SequenceDropout(dropout_prefix(seed, step), threshold, 1 / (1 - probability), users)


def drop_threshold(probability: float) -> int:
    """Return probability * 2^32, rounded: a number is dropped if its 32-bit hash is below this."""
    return round(probability * 2**32)


def dropout_prefix(seed: int, step: int | Tensor | np.ndarray) -> int | Tensor | np.ndarray:
    """Return the hash of seed and step with which the hash of each mask bit starts, from 0 to 2^32 - 1.

    For a step that is an int64 tensor or array the result is one of the same shape.
    """
    return _absorb(_mix(seed & MASK32), step)


def drop_factors(
    dropout: SequenceDropout, sites: Tensor, users: Tensor, positions: Tensor, channels: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the dropout factors [S, N, C] in `dtype`: 0 for dropped numbers, else 1 / (1 - probability).

    Args:
        dropout: the step's dropout.
        sites: int64 [S], numbers of the places in the model that have dropout.
        users, positions: int64 [N].
        channels: int64 [C].
        dtype: of the result.
    """
    site = _absorb(dropout.prefix, sites[:, None])
    position = _absorb(_absorb(site, users), positions)  # [sites, N]
    is_kept = _absorb(position[..., None], channels) >= dropout.threshold
    return is_kept.to(dtype) * dropout.scale


def _mix(h):
    """Mix the bits of a 32-bit number by xor-shifts and products; h is an int or int64 tensor from 0 to 2^32 - 1."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & MASK32
    h = (h ^ (h >> 15)) * 0x846CA68B & MASK32
    return h ^ (h >> 16)


def _absorb(h, field):
    """Return the hash of a hash h and one more number."""
    return _mix(h ^ (field * GOLDEN & MASK32))
