"""The debiased in-batch cross-entropy: the specification, deduplicated and dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inbatch_cross_entropy(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None = None,
    history_bits: Tensor | None = None,
    log_multiplicity: Tensor | None = None,
    log_popularity: Tensor | None = None,
) -> Tensor:
    """Return the debiased in-batch cross-entropy of every row over the V distinct items of a batch: log Z - t.

    t = <q, e_target> - log p_target; Z(row) = exp(t) + sum over v not in the user's items of
    exp(<q, e_v> + log m_v - log p_v) (IISAN, equation 5, duplicates merged). Without a mask Z is the sum over all v.

    Args: queries [R, d]; items [V, d]; targets int64 [R], indices of items; row_users int64 [R], rows of history_bits;
    history_bits int32 [B, ceil(V / 32)], bit v set where item v is in the user's history, as each target is;
    log_multiplicity, log_popularity [V], zero where None. Returns [R].
    """
    scores = queries @ items.T
    if log_popularity is not None:
        scores = scores - log_popularity
    target = scores.gather(1, targets[:, None])
    logits = scores if log_multiplicity is None else scores + log_multiplicity
    if history_bits is not None:
        in_history = unpack_bits(history_bits, items.shape[0])[row_users]
        logits = logits.masked_fill(in_history, float("-inf")).scatter(1, targets[:, None], target.to(logits.dtype))
    return torch.logsumexp(logits, dim=1) - target[:, 0]


def inbatch_cross_entropy_dense(
    queries: Tensor,
    slots: Tensor,
    slot_items: Tensor,
    slot_users: Tensor,
    target_slots: Tensor,
    log_popularity: Tensor,
) -> Tensor:
    """Return the loss as the paper states it: a column for every real slot of the batch, duplicates and all.

    logit(row, slot) = <q, e> - log p(item); a slot is masked when its item occurs anywhere in the row's own user's
    sequence, except the row's own target slot.

    Args: queries [R, d]; slots [T, d], the item vector in each slot; slot_items, slot_users int64 [T];
    target_slots int64 [R]; log_popularity [T]. Returns a scalar.
    """
    row_users = slot_users[target_slots]
    logits = queries @ slots.T - log_popularity
    in_history = torch.stack([torch.isin(slot_items, slot_items[slot_users == user]) for user in row_users.tolist()])
    in_history[torch.arange(len(target_slots)), target_slots] = False
    return F.cross_entropy(logits.masked_fill(in_history, float("-inf")), target_slots)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Return bool [B, columns] of int32 [B, ceil(columns / 32)]: bit v % 32 of word v // 32."""
    index = torch.arange(columns, device=bits.device)
    return (bits[:, index // 32] >> (index % 32) & 1).bool()
