"""Read the histories that a Python caller gives: lists of item ids, or lists by user."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, check_choice, first_few
from .catalogue import Catalogue
from .user_histories import UserHistories

LOGGER = logging.getLogger(__name__)
UNKNOWN = ("error", "skip")


def numbered_histories(
    histories: Sequence[Sequence[str]] | Mapping[str, Sequence[str]], catalogue: Catalogue, unknown: str
) -> UserHistories:
    """Return histories of item ids in the numbers of the catalogue.

    histories: a list of lists, whose users are "0", "1", …, or lists by user id. unknown: "skip" leaves out ids that
    the catalogue does not have, with a warning. Raises InputError for such ids if unknown is "error", with the first
    few and the number of all, and for anything that is no list of texts.
    """
    check_choice("unknown", unknown, UNKNOWN)
    by_user = _by_user(histories)
    numbers = catalogue.numbers
    ids = [item_id for history in by_user.values() for item_id in history]
    missing = list(dict.fromkeys(item_id for item_id in ids if item_id not in numbers))
    if missing and unknown == "error":
        catalogue.refuse_unknown(missing, "histories")
    if missing:
        LOGGER.warning("histories: %s unknown items are left out: %s", len(missing), first_few(missing, len(missing)))
    known = [[numbers[item_id] for item_id in history if item_id in numbers] for history in by_user.values()]
    offsets = np.cumsum([0, *map(len, known)])
    items = np.array([number for history in known for number in history], dtype=np.int64)
    return UserHistories(list(by_user), offsets, items)


def allowed_items(catalogue: Catalogue, allow: Iterable[str] | None, deny: Iterable[str] | None) -> np.ndarray | None:
    """Return which items may be recommended, bool [items]; None for all.

    Raises InputError for ids that the catalogue does not have, and for allowed ones that were removed.
    """
    if allow is None and deny is None:
        return None
    allowed = np.full(len(catalogue.item_ids), allow is None)
    if allow is not None:
        allowed[catalogue.numbers_of(_texts("allow", allow), "allow") - 1] = True
    denied = _texts("deny", deny or ())
    catalogue.refuse_unknown(denied, "deny")
    allowed[[catalogue.numbers[item_id] - 1 for item_id in denied]] = False
    return allowed


def _by_user(histories: Any) -> dict[str, list[str]]:
    """Return the item ids of each user. Raises InputError for anything that is no list of texts."""
    if isinstance(histories, Mapping):
        return {str(user_id): _texts(f"histories[{user_id!r}]", history) for user_id, history in histories.items()}
    if isinstance(histories, str) or not isinstance(histories, Iterable):
        raise InputError(f'histories: expected a list of histories, such as [["A", "B"]], found {histories!r}')
    return {str(row): _texts(f"histories[{row}]", history) for row, history in enumerate(histories)}


def _texts(name: str, values: Any) -> list[str]:
    """Return item ids as a list. Raises InputError for anything that is no list of texts."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f'{name}: expected a list of item ids, such as ["A", "B"], found {values!r}')
    texts = list(values)
    for value in texts:
        if not isinstance(value, str):
            raise InputError(f"{name}: expected item ids as text, found {value!r}")
    return texts
