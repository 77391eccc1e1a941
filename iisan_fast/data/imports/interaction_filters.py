"""Leave out repeated interactions, and users and items with few interactions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import InputError
from .options import ImportOptions
from .polars_module import pl


def without_duplicates(parts: Sequence[pl.DataFrame], which: str) -> list[pl.DataFrame]:
    """Return histories with one interaction of each user with each item, their first or their last.

    parts: whole users each, in the order of their histories. which: as in ImportOptions.duplicates.
    """
    if which == "keep":
        return list(parts)
    # One number a pair is faster to compare than two columns.
    pair = pl.col("user").to_physical().cast(pl.UInt64) * 2**32 + pl.col("item").to_physical()
    stays = pair.is_first_distinct() if which == "first" else pair.is_last_distinct()
    return [part.filter(stays) for part in parts]


def k_core(parts: Sequence[pl.DataFrame], options: ImportOptions) -> list[pl.DataFrame]:
    """Return the interactions of the largest set of users and items with user_core and item_core of them each.

    Raises InputError if none is left.
    """
    if options.user_core == options.item_core == 1:
        return list(parts)
    codes = [tuple(part[name].to_physical().to_numpy() for name in ("user", "item")) for part in parts]
    stays = _stable_codes(codes, (options.user_core, options.item_core))
    if not stays[0].any():
        raise InputError(
            f"user_core {options.user_core}, item_core {options.item_core}: no interaction is left; choose lower ones"
        )
    return [part.filter(stays[0][users] & stays[1][items]) for part, (users, items) in zip(parts, codes)]


def _stable_codes(codes: Sequence[tuple[np.ndarray, ...]], least: tuple[int, int]) -> list[np.ndarray]:
    """Return which users and which items stay, bool, by code.

    An interaction stays if its user and its item do. So the counts of each round, and nothing as long as the
    interactions, are all that is held.
    """
    sizes = [1 + max((int(pair[side].max(initial=0)) for pair in codes), default=0) for side in (0, 1)]
    stays = [np.ones(size, bool) for size in sizes]
    while True:
        counts = [np.zeros(size, np.int64) for size in sizes]
        for users, items in codes:
            both = stays[0][users] & stays[1][items]
            counts[0] += np.bincount(users[both], minlength=sizes[0])
            counts[1] += np.bincount(items[both], minlength=sizes[1])
        remaining = [count >= number for count, number in zip(counts, least)]
        if all((new == old).all() for new, old in zip(remaining, stays)):
            return stays
        stays = remaining
