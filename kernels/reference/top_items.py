"""Specification of the best items of users: a dense sort of each user's scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import AddedScores


def top_items(
    queries: Tensor,
    items: Tensor,
    count: int,
    excluded: Tensor,
    allowed: Tensor | None = None,
    chunk_elements: int = 1 << 24,
    added: AddedScores | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best items of each user by falling score; of equal scores the item with the lower row comes first.

    Args:
        queries: [U, d]; the score of an item is its dot product with the query.
        items: [N, d].
        count: K, the items to return for each user.
        excluded: int64 [U, H], row numbers of items to leave out; -1 stands for no item.
        allowed: bool [N], the items that may be returned; None allows all.
        chunk_elements: how many scores are in memory at once.
        added: added to the scores of a few items of each user, in the dtype of the queries.

    Returns int64 [U, K], row numbers of items, and their scores [U, K] in the dtype of the queries. A user with fewer
    items left has -1 and minus infinity behind them. A user with a score that is not finite, of whatever item, has -1
    and NaN everywhere.
    """
    users_at_once = max(1, chunk_elements // max(1, len(items)))
    # Equal parts, because products of other shapes may round differently, and equal items would not tie.
    parts = max(1, -(-len(queries) // users_at_once))
    first = 0
    chosen = []
    for part, left_out in zip(queries.tensor_split(parts), excluded.tensor_split(parts)):
        scores = part @ items.T
        if added is not None:
            here = added.part(first, len(part))
            scores[here.users(), here.items] += here.values
        chosen.append(_best(scores, count, left_out, allowed))
        first += len(part)
    rows, values = zip(*chosen)
    return torch.cat(rows), torch.cat(values)


def _best(scores: Tensor, count: int, excluded: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows and scores [U, count] of the best items from scores [U, N], which are changed."""
    broken = ~scores.isfinite().all(dim=1)
    if allowed is not None:
        scores[:, ~allowed] = -torch.inf
    users, places = (excluded >= 0).nonzero(as_tuple=True)
    scores[users, excluded[users, places]] = -torch.inf
    values, rows = scores.sort(dim=1, descending=True, stable=True)
    missing = max(0, count - scores.shape[1])
    values = torch.nn.functional.pad(values[:, :count], (0, missing), value=-torch.inf)
    rows = torch.nn.functional.pad(rows[:, :count], (0, missing), value=-1)
    rows = rows.masked_fill((values == -torch.inf) | broken[:, None], -1)
    return rows, values.masked_fill(broken[:, None], torch.nan)
