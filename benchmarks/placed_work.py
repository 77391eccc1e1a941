"""Place whole pieces of work, such as the runs of a sweep, on the ranks of a job, each piece on one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from ..errors import InputError
from ..progress import progress_bar
from ..ranks import Ranks

LOGGER = logging.getLogger(__name__)
Work = TypeVar("Work")


class Failure(NamedTuple):
    """The rank on which a piece of work failed, and why."""

    rank: int
    message: str

    def phrase(self, name: str, ranks: Ranks) -> str:
        """Return the name of the work, and the rank if there are several."""
        return f"{name} on rank {self.rank}" if ranks.several else name


def placed_work(title: str, works: Mapping[str, Work], do: Callable[[Work], None], ranks: Ranks) -> dict[str, Failure]:
    """Do work number i on rank i modulo their count, and return the failures by name, in the order of the work.

    title: of the progress bar. works: by name. do: does one piece of work, alone; an InputError is its failure. All
    ranks wait until all work is done, and get all failures.
    """
    names = list(works)[ranks.rank :: ranks.count]
    failures = {}
    with progress_bar(title, len(names), "runs") as advance:
        for name in names:
            try:
                do(works[name])
            except InputError as error:
                LOGGER.warning("%s: %s", name, error)
                failures[name] = Failure(ranks.rank, str(error))
            advance(1, note=name)
    of_all = {name: failure for of_rank in ranks.from_all(failures) for name, failure in of_rank.items()}
    ordered = {name: of_all[name] for name in works if name in of_all}
    for name, failure in ordered.items():
        if ranks.is_first and failure.rank:  # the other ranks do not print
            LOGGER.warning("%s: %s", failure.phrase(name, ranks), failure.message)
    return ordered
