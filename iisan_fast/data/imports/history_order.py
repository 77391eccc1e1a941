"""Bring interactions into the order of histories."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .polars_module import pl

ROWS_AT_ONCE = 1_000_000  # of a part; the last user's are completed


def ordered_histories(interactions: pl.DataFrame) -> list[pl.DataFrame]:
    """Return the interactions in parts of whole users, users in order of their codes.

    A user's interactions are in order of their part of a split, if there are parts, then of time, if there are times,
    then of the source.
    """
    order = [pl.col("user").to_physical(), *(pl.col(name) for name in ("part", "timestamp") if name in interactions)]
    ordered = interactions.sort(order, maintain_order=True)
    users = ordered["user"].to_physical().to_numpy()
    ends = np.append(np.flatnonzero(users[1:] != users[:-1]) + 1, len(users))
    cuts = ends[np.searchsorted(ends, np.arange(ROWS_AT_ONCE, len(users), ROWS_AT_ONCE))]
    return [ordered[start:end] for start, end in pairwise(np.unique([0, *cuts, len(users)]))]
