"""Read interactions that each stand beside the list of the items before them, without losing the first items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..bad_rows import BadRows
from ..polars_module import pl
from ..table import PARTS, Table

PART = "the part of its file"  # the column that says the part of an interaction
TRAINING = PARTS[0]
Row = tuple[str | None, str | None, str | None, str | None, str | None, int]


class ListedHistories:
    """A table whose rows hold a user, an item and the list of the user's items before it, as a row an interaction.

    A user's history is the list of the first row, then the item of each row. The list of a later row has to be the
    history so far, or its last items; if it goes on where the history ends, it is taken too. Rows of items alone, or of
    lists alone, are allowed. Items of lists belong to training.
    """

    names_may_be_data = False

    def __init__(
        self, table: Table, lists: Mapping[str, str], histories: dict[str, list[str]], part: str | None = None
    ) -> None:
        """Take a table and the column of lists of each column, such as {"item_id": "item_id_list"}.

        histories: of the users so far, for all tables of one dataset. part: the one of PARTS of all rows.
        """
        self.path: Path = table.path
        self.unit = table.unit
        self.columns = [*dict.fromkeys([*table.columns, *lists, PART])]
        self._table = table
        self._lists = lists
        self._histories = histories
        self._part = part or TRAINING

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield an interaction a row, with user, item, place and, if they are asked for, timestamp and part.

        Rows whose list does not fit are added to `bad_rows`. is_row: not used. Raises InputError as `bad_rows` says.
        """
        asked = {"user": columns["user"], "item list": self._lists[columns["item"]]}
        if columns["item"] in self._table.columns:
            asked["item"] = columns["item"]
        if "timestamp" in columns:
            asked["time list"] = self._lists[columns["timestamp"]]
            asked |= {"timestamp": columns["timestamp"]} if columns["timestamp"] in self._table.columns else {}
        schema = {name: pl.String for name in ("user", "item", "timestamp", "part")} | {"place": pl.Int64}
        for batch in self._table.batches(asked, bad_rows):
            absent = [pl.lit(None, pl.String).alias(name) for name in ("item", "timestamp", "time list")]
            whole = batch.with_columns(column for column in absent if column.meta.output_name() not in batch.columns)
            order = ("user", "item", "item list", "timestamp", "time list", "place")
            rows = self._interactions(whole.select(order).iter_rows(), "timestamp" in columns, bad_rows)
            frame = pl.DataFrame(list(rows), schema, orient="row")
            yield frame.select(*columns, "place")

    def _interactions(self, rows: Iterator[Row], timed: bool, bad_rows: BadRows) -> Iterator[tuple]:
        """Yield (user, item, time, part, place) of the interactions that rows add to the histories."""
        for user, item, listed_text, time, times_text, place in rows:
            listed = (listed_text or "").split()
            times = (times_text or "").split() if timed else [None] * len(listed)
            if len(times) != len(listed):
                problem = f"expected a time for each of {len(listed)} items of the list, found {len(times)}"
                bad_rows.add("list does not fit", [place], problem)
                continue
            history = self._histories.setdefault(user or "", [])
            if item is not None and _is_known(history, listed, item) and self._part == TRAINING:
                continue
            start = _new_items(history, listed)
            if start is None:
                problem = (
                    f"the list of user {user!r} does not go on from the rows before it; put a user's rows in order"
                )
                bad_rows.add("list does not fit", [place], problem)
                continue
            for at in range(start, len(listed)):
                yield user, listed[at], times[at], TRAINING, place
            history += listed[start:]
            if item is not None:
                history.append(item)
                yield user, item, time, self._part, place


def _new_items(history: Sequence[str], listed: Sequence[str]) -> int | None:
    """Return the place in a list of the first item that is new to the history; None if the list does not fit."""
    if len(listed) <= len(history):
        return len(listed) if history[len(history) - len(listed) :] == listed else None
    return len(history) if listed[: len(history)] == history else None


def _is_known(history: Sequence[str], listed: Sequence[str], item: str) -> bool:
    """Return True if a history starts with a whole list and the item after it, from a longer list before."""
    known = len(listed) + 1
    goes_on = history[len(history) - len(listed) :] == listed
    return bool(listed) and not goes_on and history[:known] == [*listed, item]
