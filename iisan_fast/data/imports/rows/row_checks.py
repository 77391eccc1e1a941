"""Check the values of rows: ids that a dataset can hold, and times, ratings and parts that were read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ....errors import InputError
from ...strict_tables import CONTROL_CHARACTERS, MAX_ID_BYTES
from ..bad_rows import BadRows
from ..options import RECBOLE_FIELDS, TABLE_COLUMNS
from ..polars_module import pl
from ..text.headers import ADVICE
from .times import is_blank

# Also a byte order mark, where files are joined, and \N, by which databases write a missing value.
UNFIT_ID = rf"^$|^\\N$|\s|\ufeff|{CONTROL_CHARACTERS}"
IDS = ("user", "item")
EXPECTED_ID = "an id without spaces, tabs, line ends or control characters"
MOST_SHOWN = 100  # characters of a bad value


def fitting_rows(rows: pl.DataFrame, bad_rows: BadRows, expected: Mapping[str, str] | None = None) -> pl.DataFrame:
    """Return the rows whose values fit; the others are added to `bad_rows`. Raises InputError as it says.

    expected: {column: what its values have to be} of the columns that were read: "NAME read" holds what was read of
    column NAME, null for a value that does not fit.
    """
    for name in (name for name in IDS if name in rows.columns):
        column = rows[name]
        bad = column.is_null() | column.str.contains(UNFIT_ID) | (column.str.len_bytes() > MAX_ID_BYTES)
        rows = _without(rows, bad.fill_null(True), f"bad {name}", name, EXPECTED_ID, bad_rows)
    for name, what in (expected or {}).items():
        if not rows[f"{name} read"].has_nulls():
            continue
        if name == "timestamp":
            blank = is_blank(rows[name]) & rows[f"{name} read"].is_null()
            rows = _without(rows, blank, "no timestamp", name, "a time", bad_rows)
        rows = _without(rows, rows[f"{name} read"].is_null(), f"bad {name}", name, what, bad_rows)
    return rows


def _without(
    rows: pl.DataFrame, bad: pl.Series, kind: str, name: str, expected: str, bad_rows: BadRows
) -> pl.DataFrame:
    """Return the rows without those of the places where `bad` is true, which are added to `bad_rows`."""
    if not bad.any():
        return rows
    places = rows["place"].filter(bad).unique(maintain_order=True)
    bad_rows.add(kind, places, _problem(name, rows[name].filter(bad)[0], expected))
    return rows.filter(~rows["place"].is_in(places.implode()))


def _problem(name: str, value: object, expected: str) -> str:
    """Return the message of a bad value."""
    shown = "nothing" if value is None else repr(value)
    if name in IDS and isinstance(value, str) and len(value.encode()) > MAX_ID_BYTES:
        return f"{name}: expected an id of at most {MAX_ID_BYTES:,} bytes, found {len(value.encode()):,}"
    return f"{name}: expected {expected}, found {shown if len(shown) < MOST_SHOWN else shown[:MOST_SHOWN] + '…'}"


def refuse_value(path: Path, name: str, is_value: bool) -> None:
    """Raise InputError if a column's name, unless it is a usual one, is also one of its values: the header is a row."""
    if is_value and name not in (*TABLE_COLUMNS, *RECBOLE_FIELDS):
        raise InputError(
            f"{path} line 1: the column's name {name!r} is also one of its values, so that the first line looks like "
            f"data; {ADVICE}, or remove what repeats the header"
        )
