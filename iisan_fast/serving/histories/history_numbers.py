"""Turn histories of item ids into the numbers of a catalogue."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import InputError, check_choice
from ..growing.catalogue import Catalogue
from .user_histories import UserHistories

LOGGER = logging.getLogger(__name__)
UNKNOWN = ("error", "skip")
SKIP = 'add them to the catalogue, or leave them out by --unknown skip, in Python unknown="skip"'


class UserRow(NamedTuple):
    """The history of one user, oldest first."""

    user_id: str
    item_ids: Sequence[str]
    where: str  # in messages: a file and its line, or a user


def number_histories(rows: Iterable[UserRow], catalogue: Catalogue, name: str, unknown: str) -> UserHistories:
    """Return histories in the numbers of a catalogue. Ids of removed items have numbers too.

    name: of all histories, for messages. unknown: "skip" leaves out ids that the catalogue does not have, with a
    warning that lists them; "error" refuses them. Raises InputError then, with the first few and the number of all, and
    for a user that stands twice.
    """
    check_choice("unknown", unknown, UNKNOWN)
    numbers = catalogue.numbers
    places: dict[str, str] = {}  # of each user
    ends = array("q", [0])
    items = array("q")
    missing: dict[str, str] = {}  # where each unknown id stands first
    for user_id, item_ids, where in rows:
        if user_id in places:
            first = "" if places[user_id] == where else f", first in {places[user_id]}"
            raise InputError(f"{where}: user {user_id!r} stands twice{first}; join the histories")
        places[user_id] = where
        for item_id in item_ids:
            number = numbers.get(item_id)
            if number is None:
                missing.setdefault(item_id, where)
            else:
                items.append(number)
        ends.append(len(items))
    if missing:
        _report(missing, catalogue, name, unknown)
    return UserHistories(
        list(places), np.array(ends, dtype=np.int64), np.array(items, dtype=np.int64), unknown=len(missing)
    )


def _report(missing: dict[str, str], catalogue: Catalogue, name: str, unknown: str) -> None:
    """Log the unknown ids that are left out. Raises InputError if they are refused.

    missing: where each of them stands first.
    """
    where = next(iter(missing.values()))
    place = "" if where == name else f", the first in {where}"
    if unknown == "error":
        raise InputError(f"{name}: {catalogue.expected_instead_of(missing)}{place}; {SKIP}")
    LOGGER.warning("%s: %s; they are left out", name, catalogue.expected_instead_of(missing))
