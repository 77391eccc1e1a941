"""Measure how many of the best items an index finds: its candidates, rescored exactly, beside an exact search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models import Scores
from .index_files import Search
from .recommendation import recommend
from .trained_model import TrainedModel
from .user_histories import UserHistories

K = 10  # items to recommend
CANDIDATES = 10  # of the index for each of them, beside those of the history
USERS_AT_ONCE = 512


@dataclass(frozen=True)
class Recall:
    """The share of the K best items that an index finds."""

    recall: float
    k: int
    users: int


def recall_of_index(model: TrainedModel, histories: UserHistories, search: Search) -> Recall:
    """Return the recall of the full score over users, none of whose histories is empty.

    The candidates of a user are those of the index and all items with a co-occurrence term; they are rescored exactly.
    """
    k = min(K, model.catalogue.available)
    hits = total = 0
    for first in range(0, len(histories.user_ids), USERS_AT_ONCE):
        part = histories.part(first, first + USERS_AT_ONCE)
        exact = np.concatenate([result.items for result in recommend(model, part, k)])
        for best, expected in zip(_approximate(model, part, search, k), exact - 1):
            expected = expected[expected >= 0]
            hits += len(np.intersect1d(best, expected))
            total += len(expected)
    return Recall(hits / max(1, total), k, len(histories.user_ids))


def _approximate(model: TrainedModel, histories: UserHistories, search: Search, k: int) -> list[np.ndarray]:
    """Return the rows of the best items of each user by the index, int64."""
    scores = model.scores(histories)
    queries = scores.queries.cpu().numpy()
    vectors = scores.vectors.cpu().numpy()
    candidates = search(np.ascontiguousarray(queries), k * CANDIDATES + int(histories.lengths.max()))
    excluded = [histories.items[start:end] - 1 for start, end in zip(histories.offsets, histories.offsets[1:])]
    best = []
    for user, rows in enumerate(candidates):
        neighbours, values = _neighbours(scores, user)
        united = np.union1d(rows[rows >= 0], neighbours)
        united = np.setdiff1d(united[~model.catalogue.is_removed[united]], excluded[user])
        totals = vectors[united] @ queries[user]
        has_value = np.isin(united, neighbours)
        totals[has_value] += values[np.isin(neighbours, united)]
        best.append(united[np.lexsort((united, -totals))[:k]])
    return best


def _neighbours(scores: Scores, user: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that have a co-occurrence term for a user, ascending, and the terms."""
    if scores.added is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    added = scores.added(np.array([user]))
    return added.items.cpu().numpy(), added.values.float().cpu().numpy()
