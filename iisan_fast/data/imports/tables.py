"""Read and check interactions and titles from delimited text and Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Protocol

from ...errors import InputError
from ..strict_tables import CONTROL_CHARACTERS, MAX_ID_BYTES
from .bad_rows import BadRows
from .headers import ADVICE, find_columns
from .options import RECBOLE_FIELDS, TABLE_COLUMNS
from .polars_module import pl

EXACT_FLOAT = 2**53  # a larger whole number may not be the one that its text says
POINT_AND_ZEROS = r"^([+-]?[0-9]+)\.0*$"
NUMBER = re.compile(rb"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
UNFIT_ID = rf"^$|\s|\ufeff|{CONTROL_CHARACTERS}"  # also a byte order mark, where files are joined
EXPECTED = {
    "user": "an id without spaces, tabs, line ends or control characters",
    "item": "an id without spaces, tabs, line ends or control characters",
    "timestamp": "a whole number",
}


class Table(Protocol):
    """A file of rows under named columns."""

    path: Path
    columns: list[str]
    unit: str  # "line" or "row": what the places of rows count
    names_may_be_data: bool  # the names of columns are the first line of a text, which may have no header

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}) and each row's `place`."""


def read_interactions(
    table: Table, columns: Mapping[str, str], bad_rows: BadRows, several_items: bool = False
) -> pl.DataFrame:
    """Return all interactions in the order of the file: 16 bytes an interaction, and the text of each id once.

    The columns are user and item, Categorical, with codes in order of first appearance, and timestamp, int64, if
    `columns` ({"user": name in the file, …}) has one. several_items: an item field holds several ids with spaces
    between. Rows without an id, with an unfit one, or without a whole number as timestamp are added to `bad_rows`.

    Raises InputError as `bad_rows` says, if no row is left, and if the header is data.
    """
    find_columns(table.path, table.columns, columns, table.names_may_be_data)
    kinds = {name: pl.Categorical(pl.Categories.random()) for name in ("user", "item")}
    parts: list[pl.DataFrame] = []
    good_rows = 0
    for batch in table.batches(columns, bad_rows, _is_interaction if "timestamp" in columns else None):
        rows = batch
        if several_items:
            rows = rows.with_columns(_split(pl.col("item"))).explode("item")
        if "timestamp" in columns:
            rows = rows.with_columns(_whole_numbers(rows["timestamp"]).alias("whole"))
        fit = fitting_rows(rows, bad_rows)
        if table.names_may_be_data:
            for name in kinds:
                _refuse_value(table.path, columns[name], (fit[name] == columns[name]).any())
        good_rows += fit["place"].n_unique() if several_items else fit.height
        # One column follows the other, since codes of columns in parallel would come in random order.
        ids = [fit[name].cast(kind) for name, kind in kinds.items()]
        parts.append(pl.DataFrame([*ids, fit["whole"].alias("timestamp")] if "timestamp" in columns else ids))
    bad_rows.finish(good_rows)
    if not good_rows:
        raise InputError(f"{table.path}: holds no interactions")
    return pl.concat(parts)


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
        _refuse_value(table.path, item_column, item_column in item_ids)
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


def _split(items: pl.Expr) -> pl.Expr:
    """Return the lists of ids of texts with one or more spaces between ids."""
    return items.str.strip_chars(" ").str.replace_all(" +", " ").str.split(" ")


def _titled(batch: pl.DataFrame, bad_rows: BadRows) -> pl.DataFrame:
    """Return the columns item and title of the rows with an item id; the others are added to `bad_rows`."""
    empty = (batch["item"].is_null() | (batch["item"] == "")).fill_null(True)
    if empty.any():
        bad_rows.add("empty item id", batch["place"].filter(empty), "expected an item id, found nothing")
        batch = batch.filter(~empty)
    return batch.select("item", "title")


def fitting_rows(rows: pl.DataFrame, bad_rows: BadRows) -> pl.DataFrame:
    """Return the rows whose values fit; the others are added to `bad_rows`. Raises InputError as it says."""
    for name in [name for name in EXPECTED if name in rows.columns]:
        column = rows[name]
        if name == "timestamp":
            bad = rows["whole"].is_null()
        else:
            bad = (
                column.is_null() | column.str.contains(UNFIT_ID) | (column.str.len_bytes() > MAX_ID_BYTES)
            ).fill_null(True)
        if bad.any():
            places = rows["place"].filter(bad).unique(maintain_order=True)
            bad_rows.add(f"bad {name}", places, _problem(name, column.filter(bad)[0]))
            rows = rows.filter(~rows["place"].is_in(places.implode()))
    return rows


def _problem(name: str, value: object) -> str:
    """Return the message of a bad value."""
    shown = "nothing" if value is None else repr(value)
    if isinstance(value, str) and len(value.encode()) > MAX_ID_BYTES and name != "timestamp":
        return f"{name}: expected an id of at most {MAX_ID_BYTES:,} bytes, found {len(value.encode()):,}"
    return f"{name}: expected {EXPECTED[name]}, found {shown if len(shown) < 100 else shown[:100] + '…'}"


def _whole_numbers(column: pl.Series) -> pl.Series:
    """Return a column of numbers, or of text such as 12, 12.0 or 1.2e1, as Int64; null for all but whole numbers."""
    if column.dtype.is_float():
        return _whole_floats(column)
    if column.dtype.is_decimal():
        column = column.cast(pl.String)
    exact = column.cast(pl.Int64, strict=False)
    if exact.null_count() == 0 or column.dtype != pl.String:
        return exact
    exact = column.str.replace(POINT_AND_ZEROS, "$1").cast(pl.Int64, strict=False)
    with_exponent = exact.is_null() & column.str.contains("[eE]")
    if not with_exponent.any():
        return exact
    numbers = column.set(~with_exponent, None).cast(pl.Float64, strict=False)
    whole = _whole_floats(numbers)
    for place in (numbers.is_finite() & (numbers.abs() >= EXACT_FLOAT)).fill_null(False).arg_true():
        whole[place] = _exact_number(column[place])
    return exact.zip_with(exact.is_not_null(), whole)


def _whole_floats(numbers: pl.Series) -> pl.Series:
    """Return a column of floats as Int64, null for all but whole numbers."""
    whole = numbers.cast(pl.Int64, strict=False)
    return whole.set(whole.cast(pl.Float64) != numbers, None)


def _exact_number(text: str) -> int | None:
    """Return the whole number of 64 bits that a number's text says, None if it says another number."""
    number = Decimal(text)
    if number != number.to_integral_value() or not -(2**63) <= number < 2**63:
        return None
    return int(number)


def _is_interaction(fields: Mapping[str, bytes]) -> bool:
    """Return True if fields, as they stand in a text, are an interaction."""
    ids = (fields["user"], fields["item"])
    return bool(NUMBER.fullmatch(fields["timestamp"])) and all(len(text.split()) == 1 for text in ids)


def _refuse_value(path: Path, name: str, is_value: bool) -> None:
    """Raise InputError if a column's name, unless it is a usual one, is also one of its values: the header is a row."""
    if is_value and name not in (*TABLE_COLUMNS, *RECBOLE_FIELDS):
        raise InputError(
            f"{path} line 1: the column's name {name!r} is also one of its values, so that the first line looks like "
            f"data; {ADVICE}, or remove what repeats the header"
        )
