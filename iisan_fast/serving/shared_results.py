"""Share out users among the ranks of a job, and bring the results to rank 0 part by part, in the users' order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..ranks import Ranks
from .histories.user_histories import UserHistories

PARTS_AT_ONCE = 16  # whose results rank 0 holds

Best = Callable[[UserHistories], tuple[np.ndarray, np.ndarray]]  # returns items int64 and scores float32, both [R, K]


class PartResult(NamedTuple):
    """The best items of R users."""

    histories: UserHistories
    items: np.ndarray  # int64 [R, K]
    scores: np.ndarray  # float32 [R, K]


def results_by_part(
    histories: UserHistories, users: int, cells: int | None, best: Best, ranks: Ranks
) -> Generator[PartResult, None, None]:
    """Yield the results of all users in parts; of several ranks rank 0 alone gets them, and the others get none.

    users, cells: the sizes of parts, as `UserHistories.parts` takes them. best: computes the results of some users.
    Every rank goes through the results to the end, or closes the generator: then it ends on all ranks. Raises
    InputError on all ranks if `best` does on one.
    """
    if not ranks.several:
        for part in histories.parts(users, cells):
            yield PartResult(part, *best(part))
        return
    first = 0
    for parts in _rounds(histories.parts(users, cells), min(ranks.count, PARTS_AT_ONCE)):
        if not ranks.from_first(True):
            return
        end = first + sum(len(part.user_ids) for part in parts)
        block = ranks.block(end - first)
        of_block = histories.part(first + block.start, first + block.stop)
        results = ranks.to_first(ranks.all_do(partial(_of_block, best, of_block.parts(users, cells))))
        if results is not None:
            try:
                yield from _cut(parts, *_joined(results))
            except GeneratorExit:
                ranks.from_first(False)
                raise
        first = end
    ranks.from_first(True)  # rank 0 has taken the last results


def _rounds(parts: Iterator[UserHistories], count: int) -> Iterator[list[UserHistories]]:
    """Yield parts in lists of `count`; the last one may be shorter."""
    while chosen := list(islice(parts, count)):
        yield chosen


def _of_block(best: Best, parts: Iterable[UserHistories]) -> tuple[np.ndarray, np.ndarray]:
    """Return the items and scores of the users of all parts."""
    return _joined(map(best, parts))


def _joined(results: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the items and scores of several results as one."""
    items, scores = zip(*results)
    return np.concatenate(items), np.concatenate(scores)


def _cut(parts: list[UserHistories], items: np.ndarray, scores: np.ndarray) -> Iterator[PartResult]:
    """Yield the results of each part. items, scores: of the users of all parts."""
    first = 0
    for part in parts:
        end = first + len(part.user_ids)
        yield PartResult(part, items[first:end], scores[first:end])
        first = end
