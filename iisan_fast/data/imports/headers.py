"""Check the names of columns: they are unique, they are there, and they are no data of a file without a header."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import InputError, first_few

IGNORED = ("-", "_")  # names of columns that are not read; they may stand several times
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", "::": "double colons"}
ADVICE = "name its columns in order with --columns (of a table of titles, --items-columns)"


def refuse_other_separator(path: Path, fields: Sequence[str], separator: str) -> None:
    """Raise InputError if a first line is one field that holds another usual separator."""
    if len(fields) == 1 and fields[0].replace("\t", "").isprintable():
        other = next((name for mark, name in SEPARATORS.items() if mark in fields[0] and mark != separator), None)
        if other is not None:
            raise InputError(
                f"{path} line 1: expected {SEPARATORS[separator]} between fields, found {other}; "
                f"write the file with {SEPARATORS[separator]}"
            )


def check_header(path: Path, names: list[str]) -> list[str]:
    """Return the names of a header. Raises InputError if it is not printable, or if two columns have one name."""
    if not "".join(names).isprintable():
        raise InputError(f"{path}: no header of names in its first line; is it in another format?")
    twice = _first_twice(name for name in names if name)
    if twice is not None:
        if looks_like_data(names, twice):
            raise InputError(f"{path} line 1: {twice!r} looks like data, not like a name; {ADVICE}")
        raise InputError(f"{path} line 1: two columns are named {twice!r}; give each column a name of its own")
    return names


def check_columns(names: Sequence[str]) -> list[str]:
    """Return the names of columns that a user gives. Raises InputError if one stands twice, or is empty."""
    used = [name.strip() for name in names]
    twice = _first_twice(name for name in used if name not in IGNORED)
    if twice is not None or "" in used:
        problem = "an empty name" if twice is None else f"{twice!r} twice"
        raise InputError(f"--columns: expected names with commas between, - for a column to ignore, found {problem}")
    return used


def find_columns(path: Path, available: Sequence[str], columns: Mapping[str, str], names_may_be_data: bool) -> None:
    """Raise InputError if a column is missing, or if its name in the header looks like data.

    columns: {new name: name in the file}. names_may_be_data: as in Table.
    """
    for column in columns.values():
        if column not in available:
            if names_may_be_data and looks_like_data(available):
                shown = next(name for name in available if is_number(name))
                raise InputError(f"{path} line 1: {shown!r} looks like data of a file without a header; {ADVICE}")
            names = first_few(available, len(available), limit=10)
            hint = "rename one or name it by an option"
            if names_may_be_data:
                hint += f"; if the file has no header, {ADVICE}"
            raise InputError(f"{path}: no column {column!r}, only {names}; {hint}")
        if names_may_be_data and looks_like_data(available, column):
            raise InputError(f"{path} line 1: {column!r} looks like data of a file without a header; {ADVICE}")


def looks_like_data(names: Sequence[str], name: str | None = None) -> bool:
    """Return True if a name (by default any) is a number, and the names do not simply count the columns."""
    counted = [str(number) for number in range(len(names))]
    if list(names) == counted or list(names[1:]) == counted[:-1]:
        return False
    return any(is_number(word) for word in (names if name is None else [name]))


def is_number(text: str) -> bool:
    """Return True if a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _first_twice(names: Iterable[str]) -> str | None:
    """Return the first name that has come before, None if there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
