"""Read histories from frames: a row for each user, or a row for each interaction, oldest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...errors import InputError, first_few
from .history_numbers import UserRow

if TYPE_CHECKING:
    import polars as pl

EXPECTED = "a list of item ids, or ids joined by spaces"


def rows_of_frame(frame: pl.DataFrame, name: str) -> Iterator[UserRow]:
    """Yield the history of each user, in the order in which the users come.

    frame: has text ids, in the columns user_id and history, or user_id and item_id for interactions. name: of the
    frame, for messages. Raises InputError for other columns, or a history of another type.
    """
    from polars import List, String

    columns = frame.columns
    if "user_id" not in columns or not {"history", "item_id"} & {*columns}:
        listed = first_few(columns, len(columns), limit=5) or "none"
        raise InputError(f"{name}: expected the columns user_id and history, or user_id and item_id, found {listed}")
    if "history" not in columns:
        frame = frame.group_by("user_id", maintain_order=True).agg(history="item_id")
    kind = frame["history"].dtype
    if kind not in (String, List(String)):
        raise InputError(f"{name}: history: expected {EXPECTED}, found {kind}")
    for user_id, history in frame.select("user_id", "history").iter_rows():
        where = f"{name} user {user_id!r}"
        yield UserRow(user_id, split_history(history, where) if isinstance(history, str) else history or [], where)


def split_history(text: str, where: str) -> list[str]:
    """Return the item ids of a text in which spaces join them. Raises InputError for two spaces between them."""
    if not text.strip():
        return []
    item_ids = text.split(" ")
    if not all(item_ids):
        raise InputError(f"{where}: an empty item id; expected one space between ids, found two or one at an end")
    return item_ids
