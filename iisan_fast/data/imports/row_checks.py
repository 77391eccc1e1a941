"""Check the values of rows: ids that a dataset can hold, and timestamps that were read."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..strict_tables import CONTROL_CHARACTERS, MAX_ID_BYTES
from .bad_rows import BadRows
from .headers import ADVICE
from .options import RECBOLE_FIELDS, TABLE_COLUMNS
from .polars_module import pl

UNFIT_ID = rf"^$|\s|\ufeff|{CONTROL_CHARACTERS}"  # also a byte order mark, where files are joined
EXPECTED = {
    "user": "an id without spaces, tabs, line ends or control characters",
    "item": "an id without spaces, tabs, line ends or control characters",
    "timestamp": "a whole number",
}


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


def refuse_value(path: Path, name: str, is_value: bool) -> None:
    """Raise InputError if a column's name, unless it is a usual one, is also one of its values: the header is a row."""
    if is_value and name not in (*TABLE_COLUMNS, *RECBOLE_FIELDS):
        raise InputError(
            f"{path} line 1: the column's name {name!r} is also one of its values, so that the first line looks like "
            f"data; {ADVICE}, or remove what repeats the header"
        )
