"""Leave out repeated interactions, and users and items with few interactions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....errors import InputError
from ..options import ImportOptions
from ..polars_module import pl
from ..writing.history_order import OrderedHistories


def without_duplicates(histories: OrderedHistories, which: str) -> OrderedHistories:
    """Return histories with one interaction of each user with each item, the first or the last in their order.

    which: as in ImportOptions.duplicates.
    """
    if which == "keep":
        return histories
    # One number a pair is faster to compare than two columns.
    pair = pl.col("user").cast(pl.UInt64) * 2**32 + pl.col("item")
    stays = pair.is_first_distinct() if which == "first" else pair.is_last_distinct()
    return histories.with_parts([part.filter(stays) for part in histories.parts])


def k_core(histories: OrderedHistories, options: ImportOptions) -> OrderedHistories:
    """Leave out users with fewer interactions than user_core and items with fewer than item_core, again and again.

    All users and items that are left have as many. Raises InputError if none is left.
    """
    if options.user_core == options.item_core == 1:
        return histories
    codes = [(part["user"].to_numpy(), part["item"].to_numpy()) for part in histories.parts]
    sizes = (len(histories.user_ids), len(histories.item_ids))
    users_stay, items_stay = _stable_codes(codes, sizes, (options.user_core, options.item_core))
    if not users_stay.any():
        raise InputError(
            f"user_core {options.user_core}, item_core {options.item_core}: no interaction is left; choose lower ones"
        )
    parts = [part.filter(users_stay[users] & items_stay[items]) for part, (users, items) in zip(histories.parts, codes)]
    return histories.with_parts(parts)


def _stable_codes(
    codes: Sequence[tuple[np.ndarray, np.ndarray]], sizes: tuple[int, int], least: tuple[int, int]
) -> list[np.ndarray]:
    """Return which users and which items stay, bool, by code.

    An interaction stays if its user and its item do. So nothing as long as the interactions is held beside them.
    """
    stays = [np.ones(size, bool) for size in sizes]
    while True:
        counts = [np.zeros(size, np.int64) for size in sizes]
        for users, items in codes:
            both = stays[0][users] & stays[1][items]
            first = int(users[0]) if len(users) else 0  # a part has few of the users
            counted = np.bincount(users[both] - np.uint32(first))
            counts[0][first : first + len(counted)] += counted
            counts[1] += np.bincount(items[both], minlength=sizes[1])
        remaining = [count >= number for count, number in zip(counts, least)]
        if all((new == old).all() for new, old in zip(remaining, stays)):
            return stays
        stays = remaining
