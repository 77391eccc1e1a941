"""Hold the items that a run can rank: those it was trained on, and those that were added since."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from ...errors import InputError, first_few


@dataclass(frozen=True)
class Catalogue:
    """All items of a run by number, from 1. An item keeps its number for ever, also if it is removed.

    A removed item may stand in a history, and is never recommended.
    """

    item_ids: list[str]  # item number i is item_ids[i - 1]; first the trained items, then the added ones
    titles: list[str] | None  # None for a run without titles
    training_counts: np.ndarray  # int64 [items + 1]: how often each number occurs in training, 0 for added items
    trained: int  # number of items with which the run was trained
    is_removed: np.ndarray  # bool [items], item number i at i - 1
    vectors: Tensor  # [items, d], item number i in row i - 1
    coordinates: Tensor | None  # float32 [items, dims] of similarity, on the host; None for a run without states

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Return the number of each item id, also of the removed ones."""
        return {item_id: number for number, item_id in enumerate(self.item_ids, start=1)}

    @property
    def available(self) -> int:
        """Return how many items may be recommended."""
        return len(self.item_ids) - int(self.is_removed.sum())

    def has(self, item_id: str) -> bool:
        """Return True if an item may be recommended; a removed one may not."""
        number = self.numbers.get(item_id)
        return number is not None and not self.is_removed[number - 1]

    def numbers_of(self, item_ids: Sequence[str], name: str) -> np.ndarray:
        """Return the numbers of items that may be recommended, int64 [N].

        name: of the setting or argument that lists them, for the message. Raises InputError, with the first few and the
        number of all, for ids that are unknown or removed.
        """
        self.refuse_unknown(item_ids, name)
        numbers = np.array([self.numbers[item_id] for item_id in item_ids], dtype=np.int64)
        if removed := [item_id for item_id, number in zip(item_ids, numbers) if self.is_removed[number - 1]]:
            raise InputError(
                f"{name}: expected items of the catalogue, found {len(removed)} removed "
                f"({first_few(removed, len(removed))})"
            )
        return numbers

    def refuse_unknown(self, item_ids: Iterable[str], name: str) -> None:
        """Raise InputError, with the first few and the number of all, for ids that the catalogue does not have."""
        unknown = [item_id for item_id in dict.fromkeys(item_ids) if item_id not in self.numbers]
        if unknown:
            raise InputError(f"{name}: {self.expected_instead_of(unknown)}")

    def expected_instead_of(self, unknown: Collection[str]) -> str:
        """Return a message's part about ids that the catalogue does not have: the first few and the number of all."""
        listed = first_few((item_id or "''" for item_id in unknown), len(unknown))
        return f"expected ids of the run's {len(self.item_ids)} items, found {len(unknown)} unknown ({listed})"
