"""Rank the catalogue of a trained run for histories."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import kernels
from ..checksums import checksum
from ..errors import InputError
from ..models import popularity_scores
from ..ranks import ALONE, Ranks
from ..training import refuse_other_runs
from .growing.catalogue import Catalogue
from .histories.user_histories import UserHistories
from .shared_results import PartResult, results_by_part
from .trained_model import TrainedModel

LOGGER = logging.getLogger(__name__)
USERS_AT_ONCE = 4096  # whose added scores are in memory at once
CELLS_AT_ONCE = 4 << 20  # of these users: items to exclude, as many for each as the longest history has, and results


class Recommended(NamedTuple):
    """The best items of R users, best first."""

    user_ids: list[str]  # [R]
    items: np.ndarray  # int64 [R, K]: item numbers, 0 behind the last item of a user for whom fewer are left
    scores: np.ndarray  # float32 [R, K], minus infinity there
    by_popularity: np.ndarray  # bool [R]: True for an empty history, which gets the popular items


def recommend(
    model: TrainedModel,
    histories: UserHistories,
    k: int = 10,
    exclude_history: bool = True,
    allowed: np.ndarray | None = None,
    ranks: Ranks = ALONE,
) -> Generator[Recommended, None, None]:
    """Return the best items of the users in parts, in the order of the histories. A part is computed when it is taken.

    Several ranks share out the users: rank 0 gets the parts, and the others go through none of them to the end.

    k: the items to return, at most the catalogue. exclude_history: leave out the items of the user's history. allowed:
    bool [items], the items that may be recommended; None allows all. Removed items never are. A user with an empty
    history gets the most popular items, of which equal ones by item number, and a warning says how many users do.
    Raises InputError for a k that does not fit, if no item is allowed, if ranks differ in an argument, or, from a part,
    if a score is not finite.
    """
    if ranks.several:
        refuse_other_runs(ranks, model.encoder, _compared(model, histories, k, exclude_history, allowed))
    catalogue = model.catalogue
    refuse_unfit_count(k, catalogue)
    permitted = ~catalogue.is_removed if allowed is None else allowed & ~catalogue.is_removed
    if not permitted.any():
        raise InputError("allow, deny: expected to leave items to recommend, found that they leave none")
    empty = int((histories.lengths == 0).sum())
    if empty and ranks.is_first:
        LOGGER.warning(
            "%s of %s users have no history, and get the most popular items",
            f"{empty:,}",
            f"{len(histories.user_ids):,}",
        )
    users_at_once = max(1, min(USERS_AT_ONCE, CELLS_AT_ONCE // k))
    cells = CELLS_AT_ONCE if exclude_history else None

    def best(part: UserHistories) -> tuple[np.ndarray, np.ndarray]:
        return _best(model, part, k, exclude_history, permitted)

    return _recommended(results_by_part(histories, users_at_once, cells, best, ranks))


def _compared(
    model: TrainedModel, histories: UserHistories, k: int, exclude_history: bool, allowed: np.ndarray | None
) -> dict[str, Any]:
    """Return the arguments of `recommend`, or their checksums, to compare them on all ranks."""
    arrays = {"histories": histories.items, "their ends": histories.offsets, "removed": model.catalogue.is_removed}
    if allowed is not None:
        arrays["allowed"] = allowed
    checksums = {name: checksum(np.ascontiguousarray(array).data).hex() for name, array in arrays.items()}
    return {**checksums, "k": k, "exclude_history": exclude_history}


def refuse_unfit_count(k: int, catalogue: Catalogue) -> None:
    """Raise InputError unless k items of a catalogue can be returned."""
    if type(k) is not int or not 1 <= k <= catalogue.available:
        raise InputError(
            f"k: expected a number from 1 to {catalogue.available}, the items of the catalogue, found {k!r}"
        )


def _recommended(results: Generator[PartResult, None, None]) -> Generator[Recommended, None, None]:
    """Yield results as recommendations, and close them if it is closed."""
    with closing(results):
        for histories, items, scores in results:
            yield Recommended(histories.user_ids, items, scores, histories.lengths == 0)


def _best(
    model: TrainedModel, histories: UserHistories, k: int, exclude_history: bool, permitted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best items and their scores, both [R, k], of a few users, with and without histories.

    Raises InputError as `recommend` does.
    """
    items = np.zeros((len(histories.user_ids), k), dtype=np.int64)
    scores = np.full(items.shape, -np.inf, dtype=np.float32)
    is_empty = histories.lengths == 0
    if not is_empty.all():
        chosen = _without_empty(histories, ~is_empty)
        items[~is_empty], scores[~is_empty] = _ranked(model, chosen, k, exclude_history, permitted)
    if is_empty.any():
        items[is_empty], scores[is_empty] = _popular(model, k, permitted)
    return items, scores


def _without_empty(histories: UserHistories, chosen: np.ndarray) -> UserHistories:
    """Return the histories of the chosen users, bool [R]; those of the others are empty."""
    user_ids = [user_id for user_id, keep in zip(histories.user_ids, chosen) if keep]
    return UserHistories(user_ids, np.concatenate([[0], np.cumsum(histories.lengths[chosen])]), histories.items)


def _ranked(
    model: TrainedModel, histories: UserHistories, k: int, exclude_history: bool, permitted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the item numbers and scores [R, k] of users whose histories are not empty.

    Raises InputError if a score is not finite.
    """
    scores = model.scores(histories)
    width = int(histories.lengths.max()) if exclude_history else 0
    excluded = torch.from_numpy(histories.latest(width) - 1)
    rows, values = kernels.top_items(
        scores.queries,
        scores.vectors,
        k,
        excluded.to(model.device),
        allowed=torch.from_numpy(permitted).to(model.device),
        added=None if scores.added is None else scores.added(np.arange(len(histories.user_ids))),
    )
    if values.isnan().any():
        raise InputError(
            f"{model.run}: {int(values.isnan().any(dim=1).sum())} of {len(values)} users have a score that is not "
            "finite; the model has diverged"
        )
    return rows.cpu().numpy() + 1, values.float().cpu().numpy()


def _popular(model: TrainedModel, k: int, permitted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the item numbers and scores [k] of the most popular items."""
    queries, vectors = popularity_scores(model.catalogue.training_counts, 1, torch.device("cpu"))
    nothing = torch.empty((1, 0), dtype=torch.int64)
    rows, values = kernels.top_items(queries, vectors, k, nothing, allowed=torch.from_numpy(permitted))
    return rows[0].numpy() + 1, values[0].numpy()
