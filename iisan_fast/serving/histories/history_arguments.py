"""Read the histories that a Python caller gives: lists of item ids, such lists by user, or frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ...data import as_polars
from ...errors import InputError
from ..growing.catalogue import Catalogue
from .history_frames import rows_of_frame
from .history_numbers import UserRow, number_histories
from .user_histories import UserHistories

FRAMES = ("__arrow_c_stream__", "__dataframe__")  # methods of a frame of polars, pandas or pyarrow


def numbered_histories(histories: Any, catalogue: Catalogue, unknown: str) -> UserHistories:
    """Return histories of item ids in the numbers of the catalogue.

    histories: a list of lists, whose users are "0", "1", …, or lists by user id, or a frame (pandas, polars, arrow) or
    list of dicts with user_id and history, or with user_id and item_id for interactions, oldest first. unknown: as
    `number_histories` takes it. Raises InputError as that does, and for anything of another form.
    """
    return number_histories(_rows(histories), catalogue, "histories", unknown)


def allowed_items(catalogue: Catalogue, allow: Iterable[str] | None, deny: Iterable[str] | None) -> np.ndarray | None:
    """Return which items may be recommended, bool [items]; None for all.

    Raises InputError for ids that the catalogue does not have, and for allowed ones that were removed.
    """
    if allow is None and deny is None:
        return None
    allowed = np.full(len(catalogue.item_ids), allow is None)
    if allow is not None:
        allowed[catalogue.numbers_of(item_id_list("allow", allow), "allow") - 1] = True
    denied = item_id_list("deny", deny or ())
    catalogue.refuse_unknown(denied, "deny")
    allowed[[catalogue.numbers[item_id] - 1 for item_id in denied]] = False
    return allowed


def _rows(histories: Any) -> Iterator[UserRow]:
    """Yield the history of each user. Raises InputError for anything that is neither lists of texts nor a frame."""
    if any(hasattr(histories, name) for name in FRAMES) or _is_records(histories):
        yield from rows_of_frame(as_polars(histories, "histories"), "histories")
        return
    if isinstance(histories, Mapping):
        named = ((str(user_id), f"histories[{user_id!r}]", history) for user_id, history in histories.items())
    elif isinstance(histories, str) or not isinstance(histories, Iterable):
        raise InputError(f'histories: expected a list of histories, such as [["A", "B"]], found {histories!r}')
    else:
        named = ((str(row), f"histories[{row}]", history) for row, history in enumerate(histories))
    for user_id, where, history in named:
        yield UserRow(user_id, item_id_list(where, history), where)


def _is_records(histories: Any) -> bool:
    """Return True for a list of dicts, each a row."""
    return isinstance(histories, list) and bool(histories) and isinstance(histories[0], Mapping)


def item_id_list(name: str, values: Any) -> list[str]:
    """Return item ids as a list. Raises InputError for anything that is no list of texts."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f'{name}: expected a list of item ids, such as ["A", "B"], found {values!r}')
    texts = list(values)
    for value in texts:
        if not isinstance(value, str):
            raise InputError(f"{name}: expected item ids as text, found {value!r}")
    return texts
