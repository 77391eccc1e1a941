"""Measure how many of the best items an index finds: its candidates, rescored exactly, beside an exact search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...models import Scores
from ..histories.user_histories import UserHistories
from ..recommendation import recommend
from ..trained_model import TrainedModel
from .index_files import Search

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

    The candidates of a user are those of the index and all items with a co-occurrence term. They are rescored exactly,
    so one of the K best items is found if it is a candidate: no more candidates are better than items are.
    """
    k = min(K, model.catalogue.available)
    hits = total = 0
    for first in range(0, len(histories.user_ids), USERS_AT_ONCE):
        part = histories.part(first, first + USERS_AT_ONCE)
        exact = np.concatenate([result.items for result in recommend(model, part, k)])
        for candidates, expected in zip(_candidates(model, part, search, k), exact - 1):
            expected = expected[expected >= 0]
            hits += int(np.isin(expected, candidates).sum())
            total += len(expected)
    return Recall(hits / max(1, total), k, len(histories.user_ids))


def _candidates(model: TrainedModel, histories: UserHistories, search: Search, k: int) -> Iterator[np.ndarray]:
    """Yield the rows of the candidates of each user, int64: of the index as many as a service takes for the user."""
    scores = model.scores(histories)
    counts = k * CANDIDATES + histories.lengths
    rows = search(np.ascontiguousarray(scores.queries.cpu().numpy()), int(counts.max()))
    for user, count in enumerate(counts):
        yield np.concatenate([rows[user, :count], _neighbours(scores, user)])


def _neighbours(scores: Scores, user: int) -> np.ndarray:
    """Return the rows that have a co-occurrence term for a user."""
    if scores.added is None:
        return np.empty(0, dtype=np.int64)
    return scores.added(np.array([user])).items.cpu().numpy()
