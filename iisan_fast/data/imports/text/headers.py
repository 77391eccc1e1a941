"""Check the names of columns: they are unique, they are there, and they are no data of a file without a header."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ....errors import InputError, first_few
from .delimited_form import is_utf8

IGNORED = ("-", "_")  # names of columns that are not read; they may stand several times
NO_HEADER = "no header of names in its first line; is it in another format?"
OTHER_FORMATS = {b"{": "JSON", b"[{": "JSON", b"<!": "a web page or XML", b"<html": "a web page", b"<?xml": "XML"}
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f]")
ID_NAME = re.compile(
    r"(user|item|customer|reviewer|session|visitor|member|movie|video|product|article|book|song|track|artist|news|game|"
    r"business|u|i)s?([ _-]?(ids?|names?|no))?|.*[ _-]id|asin|isbn",
    re.IGNORECASE,
)  # names of columns of ids
INDEX_ROWS = 3  # the least number of rows that an index can be seen by
ADVICE = "name its columns in order with --columns (of a table of titles, --items-columns)"


def refuse_empty(path: Path, beginning: bytes) -> None:
    """Raise InputError if a text's first line is empty."""
    if not beginning.partition(b"\n")[0].strip():
        what = "the first line is empty" if beginning.strip() else "empty"
        raise InputError(f"{path}: {what}; expected a header of names in it")


def refuse_other_format(path: Path, beginning: bytes) -> None:
    """Raise InputError if a text's first line is no line of names, but JSON, a web page, UTF-16 or no text."""
    line = beginning.partition(b"\n")[0].rstrip(b"\r ")
    other = next((form for mark, form in OTHER_FORMATS.items() if line.lower().startswith(mark)), None)
    if other is not None:
        raise InputError(f"{path} line 1: looks like {other}; expected a header of names with separators between")
    for first, encoding in ((0, "utf-16-le"), (1, "utf-16-be")):
        if len(line) > 1 and all(line[first:-1:2]) and not any(line[1 - first : -1 : 2]):
            raise InputError(f"{path} line 1: looks like UTF-16 without a byte order mark: --encoding {encoding}")
    if CONTROL_CHARACTERS.search(line) or (b"\0" in beginning[:1000] and not is_utf8(line)):
        raise InputError(f"{path}: {NO_HEADER}")


def fit_header(names: list[str], rows: Sequence[Sequence[bytes]]) -> list[str]:
    """Return the names of as many columns as the rows have, if a column without a name is lacking or too many.

    rows: the first rows below the header. A column without a name is an index, or what is behind a separator at the
    end of each row.
    """
    counts = {len(row) for row in rows}
    if counts == {len(names) - 1} and (names[0] == "") != (names[-1] == ""):
        return names[1:] if names[0] == "" else names[:-1]
    if counts == {len(names) + 1}:
        first = [row[0] for row in rows]
        if len(rows) >= INDEX_ROWS and any(first == [b"%d" % at for at in range(s, s + len(rows))] for s in (0, 1)):
            return ["", *names]
        if not any(row[-1] for row in rows):
            return [*names, ""]
    return names


def check_header(path: Path, names: list[str]) -> list[str]:
    """Return the names of a header. Raises InputError if it is not printable, or if two columns have one name."""
    if not "".join(names).isprintable():
        raise InputError(f"{path}: {NO_HEADER}")
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


def refuse_header(path: Path, columns: Sequence[str], ids: Sequence[str], rows: Sequence[Sequence[bytes]]) -> None:
    """Raise InputError if the first row of a file that a user says to have no header looks like one.

    So it does if it has the names that the user gives, or if its ids, of the columns `ids`, all look like names of
    such columns. rows: the first row, if there is one.
    """
    for row in rows:
        fields = [field.decode(errors="replace").strip(" ") for field in row]
        named = [(name, field) for name, field in zip(columns, fields) if name not in IGNORED]
        if len(fields) != len(columns):
            continue
        if named and all(name == field for name, field in named):
            raise InputError(f"{path} line 1: names the columns, so that the file has a header; leave out --columns")
        words = [field for name, field in named if name in ids]
        if len(words) > 1 and all(ID_NAME.fullmatch(word) for word in words):
            shown = " and ".join(map(repr, words))
            raise InputError(
                f"{path} line 1: {shown} look like names of columns, so that the file has a header; leave out "
                "--columns, and name its columns by options such as --user-column"
            )


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
