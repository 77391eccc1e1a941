"""The generalised binary cross-entropy of gSASRec, in plain PyTorch. It has no other form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .inbatch_cross_entropy import unpack_bits


def generalised_binary_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor,
    history_bits: Tensor,
    multiplicity: Tensor,
    power: float,
    negatives: int,
) -> Tensor:
    """Return the generalised binary cross-entropy [R] of each row, in the dtype of the queries.

    With the score s(v) = <q, e_v> it is, after Petrov and Macdonald (gSASRec, RecSys 2023, section 5),
    -(power log sigmoid(s(target)) + sum over v of m_v log(1 - sigmoid(s(v)))) / (negatives + 1), where v runs through
    the items outside the user's history that are not the target.

    Args:
        queries: [R, d].
        items: [V, d].
        targets: int64 [R], indices of items.
        row_users: int64 [R], rows of history_bits.
        history_bits: int32 [B, ceil(V / 32)]; bit v is set where item v is no negative of the user's rows.
        multiplicity: int64 [V]: m_v, how often an item counts; 0 for padding.
        power: of the target's probability, beta in the paper; 1 gives the plain binary cross-entropy.
        negatives: how many were drawn, those of the user's history included.
    """
    scores = queries @ items.T
    barred = unpack_bits(history_bits, items.shape[0])[row_users].scatter(1, targets[:, None], True)
    weights = multiplicity.to(scores.dtype).masked_fill(barred, 0)
    of_negatives = (F.softplus(scores) * weights).sum(1)
    of_target = F.softplus(-(queries * items[targets]).sum(1))
    return (power * of_target + of_negatives) / (negatives + 1)
