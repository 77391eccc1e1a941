"""The rank of a target in the catalogue, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import AddedScores


def target_rank(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    excluded: Tensor,
    tie_share: float = 0.5,
    chunk_elements: int = 1 << 24,
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rank of each target: 1 + items that score higher + tie_share times the other items that tie.

    Args:
        queries: [U, d]; the score of an item is its dot product with the query.
        items: [N, d].
        targets: int64 [U], row numbers of items.
        excluded: int64 [U, H], row numbers of items to leave out; -1 stands for no item, repeats count once.
        tie_share: how much a tie counts, from 0 to 1.
        chunk_elements: how many scores are in memory at once.
        added: added to the scores of a few items of each user, in the dtype of the queries.

    Returns two float64 [U]: the rank without the excluded items, infinite if the target is excluded, and the rank among
    all items. Both are NaN for a user with a score that is not finite.
    """
    users_at_once = max(1, chunk_elements // max(1, len(items)))
    # Equal parts, because products of other shapes may round differently, and equal items would not tie.
    parts = max(1, -(-len(queries) // users_at_once))
    first = 0
    ranks = []
    for part, target, left_out in zip(*(x.tensor_split(parts) for x in (queries, targets, excluded))):
        scores = part @ items.T
        if added is not None:
            here = added.part(first, len(part))
            scores[here.users(), here.items] += here.values
        ranks.append(_rank_chunk(scores, target[:, None], left_out, tie_share))
        first += len(part)
    masked, unmasked = zip(*ranks)
    return torch.cat(masked), torch.cat(unmasked)


def _rank_chunk(scores: Tensor, targets: Tensor, excluded: Tensor, tie_share: float) -> tuple[Tensor, Tensor]:
    """Return both ranks [U] of targets [U, 1] from scores [U, N] and excluded [U, H]."""
    target = scores.gather(1, targets)
    higher = (scores > target).sum(dim=1)
    ties = (scores == target).sum(dim=1) - 1
    # An excluded item is counted once however often the history repeats it.
    listed, _ = excluded.sort(dim=1)
    counted = (listed >= 0) & (listed != targets)
    counted[:, 1:] &= listed[:, 1:] != listed[:, :-1]
    excluded_scores = scores.gather(1, listed.clamp(min=0))
    excluded_higher = (counted & (excluded_scores > target)).sum(dim=1)
    excluded_ties = (counted & (excluded_scores == target)).sum(dim=1)
    broken = ~scores.isfinite().all(dim=1)
    unmasked = (1 + higher + tie_share * ties.double()).masked_fill(broken, float("nan"))
    masked = unmasked - excluded_higher - tie_share * excluded_ties.double()
    unreachable = (excluded == targets).any(dim=1) & ~broken
    return masked.masked_fill(unreachable, float("inf")), unmasked
