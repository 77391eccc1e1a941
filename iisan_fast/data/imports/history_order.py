"""Bring interactions into the order of histories."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .polars_module import pl

ROWS_AT_ONCE = 1_000_000  # of a part; the last user's are completed
SORTED_AT_ONCE = 4  # parts; a sort needs much memory beside its rows


def ordered_histories(interactions: pl.DataFrame) -> list[pl.DataFrame]:
    """Return the interactions in parts of whole users, users in order of their codes.

    A user's interactions are in order of their part of a split, if there are parts, then of time, if there are times,
    then of the source.
    """
    user = pl.col("user").to_physical()
    order = [user, *(pl.col(name) for name in ("part", "timestamp") if name in interactions)]
    parts: list[pl.DataFrame] = []
    for first, last in _ranges_of_users(interactions["user"].to_physical()):
        ordered = interactions.filter(user.is_between(first, last)).sort(order, maintain_order=True)
        parts += _whole_users(ordered)
    return parts


def _ranges_of_users(codes: pl.Series) -> list[tuple[int, int]]:
    """Return the first and last codes of the users who are sorted at once. codes: of the user of each interaction."""
    counts = np.zeros(int(codes.max()) + 1, np.int64)
    for chunk in codes.get_chunks():
        counts += np.bincount(chunk.to_numpy(), minlength=len(counts))
    ends = np.cumsum(counts)
    at_once = SORTED_AT_ONCE * ROWS_AT_ONCE
    cuts = np.searchsorted(ends, np.arange(at_once, ends[-1], at_once)) + 1
    return [(start, end - 1) for start, end in pairwise(np.unique([0, *cuts, len(counts)]).tolist())]


def _whole_users(ordered: pl.DataFrame) -> list[pl.DataFrame]:
    """Return interactions, which are ordered by user, in parts of about ROWS_AT_ONCE, whole users each."""
    users = ordered["user"].to_physical().to_numpy()
    ends = np.append(np.flatnonzero(users[1:] != users[:-1]) + 1, len(users))
    cuts = ends[np.searchsorted(ends, np.arange(ROWS_AT_ONCE, len(users), ROWS_AT_ONCE))]
    return [ordered[start:end] for start, end in pairwise(np.unique([0, *cuts, len(users)]))]
