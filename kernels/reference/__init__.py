"""Every op in plain PyTorch: the specification that any faster form is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
GATE_TEMPERATURE = 0.1


class States(NamedTuple):
    """One view's hidden states [M, K, D] and which of them to read: row numbers int64 [N], or None for all in order."""

    table: Tensor
    rows: Tensor | None = None


class Tower(NamedTuple):
    """A tower's parameters, shaped as `side_tower` says, and the numbers of the views it reads: one, or (0, 1)."""

    views: tuple[int, ...]
    gate: Tensor | None
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


class Chain(NamedTuple):
    """Three linear maps that follow one another, [D] to [H] to [d'] to [d]; the last has no bias."""

    outer: Tensor  # [d, d']
    middle: Tensor  # [d', H]
    middle_bias: Tensor  # [d']
    inner: Tensor  # [H, D]
    inner_bias: Tensor  # [H]


def fold(chain: Chain) -> tuple[Tensor, Tensor]:
    """The weight [d, D] and the bias [d] of the one map that a chain comes to."""
    outer, middle, middle_bias, inner, inner_bias = chain
    return outer @ middle @ inner, folded_bias(chain)


def folded_bias(chain: Chain) -> Tensor:
    """The bias [d] alone."""
    return chain.outer @ torch.addmv(chain.middle_bias, chain.middle, chain.inner_bias)


def side_towers(
    states: Sequence[States],
    towers: Sequence[Tower],
    activation: str = "relu",
    projections: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The towers of a side network, all of one shape (K, R, D), each over one or both of the views.

    Returns [N, D] a tower, in its weights' dtype, or [N, d] by projections [d, D], one a tower; differentiable in the
    parameters and projections, and in states read in order.
    """
    views = [view.table if view.rows is None else view.table[view.rows] for view in states]
    outputs = [
        side_tower(views[tower.views[0]], views[1] if len(tower.views) == 2 else None, *tower[1:], activation)
        for tower in towers
    ]
    return outputs if projections is None else list(map(F.linear, outputs, projections))


def side_tower(
    first: Tensor,
    second: Tensor | None,
    gate: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str = "relu",
) -> Tensor:
    """One tower of the side network over K kept layers (IISAN, equations 2-4, in the released code's form).

    SANB(x) = x + W_up act(W_down x + b_down) + b_up and g = sigmoid(gate / 0.1), from s = 0:
    intra (second is None): s = SANB_i(g_i first_i + (1 - g_i) s);
    inter: s = SANB_i(s + g_i first_i + (1 - g_i) second_i). Without gates every weight is 1.

    Args: first, second [N, K, D] hidden states; gate [K]; down_weight [K, R, D]; down_bias [K, R];
    up_weight [K, D, R]; up_bias [K, D]. Returns [N, D] in the weights' dtype.
    """
    act = ACTIVATIONS[activation]
    state = down_weight.new_zeros(first.shape[0], first.shape[2])
    weights = None if gate is None else torch.sigmoid(gate / GATE_TEMPERATURE)
    for i in range(down_weight.shape[0]):
        h = first[:, i].to(state.dtype)
        other = state if second is None else second[:, i].to(state.dtype)
        mixed = h + other if weights is None else weights[i] * h + (1 - weights[i]) * other
        x = mixed if second is None else state + mixed
        state = x + F.linear(act(F.linear(x, down_weight[i], down_bias[i])), up_weight[i], up_bias[i])
    return state


def row_losses(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    row_users: Tensor | None = None,
    history_bits: Tensor | None = None,
    log_multiplicity: Tensor | None = None,
    log_popularity: Tensor | None = None,
) -> Tensor:
    """Debiased in-batch cross-entropy of every row over the V distinct items of a batch: log Z - t.

    t = <q, e_target> - log p_target; Z(row) = exp(t) + sum over v not in the user's items of
    exp(<q, e_v> + log m_v - log p_v) (IISAN, equation 5, duplicates merged). Without a mask Z is the sum over all v.

    Args: queries [R, d]; items [V, d]; targets int64 [R], indices of items; row_users int64 [R], rows of history_bits;
    history_bits int32 [B, ceil(V / 32)], bit v set where item v is the user's own, as every target of theirs is;
    log_multiplicity, log_popularity [V], zero where None. Returns [R].
    """
    scores = queries @ items.T
    if log_popularity is not None:
        scores = scores - log_popularity
    target = scores.gather(1, targets[:, None])
    logits = scores if log_multiplicity is None else scores + log_multiplicity
    if history_bits is not None:
        own = unpack_bits(history_bits, items.shape[0])[row_users]
        logits = logits.masked_fill(own, float("-inf")).scatter(1, targets[:, None], target.to(logits.dtype))
    return torch.logsumexp(logits, dim=1) - target[:, 0]


def inbatch_cross_entropy_dense(
    queries: Tensor,
    slots: Tensor,
    slot_items: Tensor,
    slot_users: Tensor,
    target_slots: Tensor,
    log_popularity: Tensor,
) -> Tensor:
    """The same loss as the paper states it: a column for every real slot of the batch, duplicates and all.

    logit(row, slot) = <q, e> - log p(item); a slot is masked when its item occurs anywhere in the row's own user's
    sequence, except the row's own target slot.

    Args: queries [R, d]; slots [T, d], the item vector in each slot; slot_items, slot_users int64 [T];
    target_slots int64 [R]; log_popularity [T]. Returns a scalar.
    """
    row_users = slot_users[target_slots]
    logits = queries @ slots.T - log_popularity
    own = torch.stack([torch.isin(slot_items, slot_items[slot_users == user]) for user in row_users.tolist()])
    own[torch.arange(len(target_slots)), target_slots] = False
    return F.cross_entropy(logits.masked_fill(own, float("-inf")), target_slots)


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
) -> tuple[Tensor, Tensor]:
    """Rank of each target: 1 + items that score higher + tie_share of the others that tie.

    Returns float64 [U] twice: among the items that are not excluded (infinity for a target that is itself excluded),
    and among all items. A row with any non-finite score has rank NaN in both.

    Args: queries [U, d]; items [N, d]; targets int64 [U], row numbers of items; excluded int64 [U, H], items left
    out of each ranking, -1 for none; chunk_elements bounds the scores held at a time.
    """
    users_at_once = max(1, chunk_elements // max(1, len(items)))
    parts = max(
        1, -(-len(queries) // users_at_once)
    )  # equal ones: equal items tie only within one kind of matrix product
    masked, unmasked = zip(
        *(
            _rank_chunk(some @ items.T, target[:, None], left_out, tie_share)
            for some, target, left_out in zip(
                queries.tensor_split(parts), targets.tensor_split(parts), excluded.tensor_split(parts)
            )
        )
    )
    return torch.cat(masked), torch.cat(unmasked)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """bool [B, columns] of int32 [B, ceil(columns / 32)]: bit v % 32 of word v // 32."""
    index = torch.arange(columns, device=bits.device)
    return (bits[:, index // 32] >> (index % 32) & 1).bool()


def _rank_chunk(scores: Tensor, targets: Tensor, excluded: Tensor, tie_share: float) -> tuple[Tensor, Tensor]:
    target = scores.gather(1, targets)
    higher = (scores > target).sum(dim=1)
    ties = (scores == target).sum(dim=1) - 1
    # An excluded item is counted once however often the history repeats it.
    listed, _ = excluded.sort(dim=1)
    counted = (listed >= 0) & (listed != targets)
    counted[:, 1:] &= listed[:, 1:] != listed[:, :-1]
    own = scores.gather(1, listed.clamp(min=0))
    own_higher = (counted & (own > target)).sum(dim=1)
    own_ties = (counted & (own == target)).sum(dim=1)
    broken = ~scores.isfinite().all(dim=1)
    unmasked = (1 + higher + tie_share * ties.double()).masked_fill(broken, float("nan"))
    masked = unmasked - own_higher - tie_share * own_ties.double()
    unreachable = (excluded == targets).any(dim=1) & ~broken
    return masked.masked_fill(unreachable, float("inf")), unmasked
