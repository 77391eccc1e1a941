"""The debiased in-batch cross-entropy: the specification over distinct items, and the paper's form over all slots."""

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
    """Return the debiased in-batch cross-entropy [R] of each row over the V distinct items of a batch: log Z - t.

    It is equation 5 of IISAN with the columns of equal items merged: t = <q, e_target> - log p_target and
    Z = exp(t) + sum over the items v outside the user's history of exp(<q, e_v> + log m_v - log p_v).
    Without history_bits Z is the sum over all v.

    Args:
        queries: [R, d].
        items: [V, d].
        targets: int64 [R], indices of items.
        row_users: int64 [R], rows of history_bits.
        history_bits: int32 [B, ceil(V / 32)]; bit v is set where item v is in the user's history. The target
            counts once, whether its bit is set or not.
        log_multiplicity, log_popularity: [V]; 0 where None.
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
    """Return the mean loss as the paper states it (IISAN, equation 5), with one column for each slot of the batch.

    logit(row, slot) = <q, e_slot> - log p_slot. A slot is masked if its item occurs in the sequence of the row's user,
    except for the row's target slot.

    Args:
        queries: [R, d].
        slots: [T, d], the item vector in each slot; items may repeat.
        slot_items, slot_users: int64 [T], item and user of each slot.
        target_slots: int64 [R], the slot of each row's target.
        log_popularity: [T], log p of each slot's item.
    """
    row_users = slot_users[target_slots]
    logits = queries @ slots.T - log_popularity
    in_history = torch.stack([torch.isin(slot_items, slot_items[slot_users == user]) for user in row_users.tolist()])
    in_history[torch.arange(len(target_slots)), target_slots] = False
    return F.cross_entropy(logits.masked_fill(in_history, float("-inf")), target_slots)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Return bool [B, columns] from int32 [B, ceil(columns / 32)]; column v is bit v % 32 of word v // 32."""
    index = torch.arange(columns, device=bits.device)
    return (bits[:, index // 32] >> (index % 32) & 1).bool()
