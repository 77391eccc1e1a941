"""Read the titles of items from tables."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import chain
from pathlib import Path

from ...errors import InputError
from .bad_rows import BadRows
from .headers import find_columns
from .polars_module import pl
from .row_checks import refuse_value
from .table import Table


def read_titles(
    table: Table, item_column: str, title_column: str, item_ids: Container[str], bad_rows: BadRows
) -> dict[str, str]:
    """Return {item id: title} of a table, as `titles_of` does. Rows without an item id are added to `bad_rows`.

    item_ids: the ids in the interactions. Raises InputError as `bad_rows` says, for two titles of an item, and if the
    header is data.
    """
    columns = {"item": item_column, "title": title_column}
    find_columns(table.path, table.columns, columns, table.names_may_be_data)
    if table.names_may_be_data:
        refuse_value(table.path, item_column, item_column in item_ids)
    batches = table.batches(columns, bad_rows, lambda fields: fields["item"].decode(errors="replace") in item_ids)
    titled = [_titled(batch, bad_rows) for batch in batches]
    bad_rows.finish(sum(batch.height for batch in titled))
    return titles_of(table.path, chain.from_iterable(batch.iter_rows() for batch in titled))


def titles_of(path: Path, rows: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Return {item id: title} of the items with a title; runs of whitespace become one space.

    Raises InputError if an item has two different titles.
    """
    titles: dict[str, str] = {}
    for item_id, text in rows:
        title = " ".join((text or "").replace("\0", " ").split())
        if title and titles.setdefault(item_id, title) != title:
            raise InputError(f"{path}: item {item_id!r} has two titles, {titles[item_id]!r} and {title!r}; keep one")
    return titles


def _titled(batch: pl.DataFrame, bad_rows: BadRows) -> pl.DataFrame:
    """Return the columns item and title of the rows with an item id; the others are added to `bad_rows`."""
    empty = (batch["item"].is_null() | (batch["item"] == "")).fill_null(True)
    if empty.any():
        bad_rows.add("empty item id", batch["place"].filter(empty), "expected an item id, found nothing")
        batch = batch.filter(~empty)
    return batch.select("item", "title")
