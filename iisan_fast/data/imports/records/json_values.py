"""Parse JSON objects one by one, and make columns of their values: exact, whatever their types."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..bad_rows import BadRows
from ..polars_module import pl
from ..rows.decimal_times import EXACT_FLOAT

Keys = tuple[str, ...]  # from an object to a value in it, which may be in an object within it
Parser = Callable[[str], object]

ID_COLUMNS = ("user", "item")
TEXT_COLUMNS = (*ID_COLUMNS, "title")  # new names of columns that become text
EXPECTED = {"user": "text or a whole number", "item": "text or a whole number", "title": "text"}
SHOWN = 60  # characters of a bad line in a message
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character: valid in JSON, and no text
PARSE_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


class UnfitLine(Exception):
    """A line that holds no object: its kind and its problem."""

    def __init__(self, kind: str, problem: str) -> None:
        """Take the kind, by which lines are counted, and the problem with all details."""
        super().__init__(problem)
        self.kind = kind


def parse_json(text: str) -> object:
    """Return the value of a JSON text. Of a key that comes twice the first value counts. Raises one of PARSE_ERRORS."""
    return json.loads(text, strict=False, object_pairs_hook=first_values)


def parse_python(text: str) -> object:
    """Return the value of a JSON text or of a Python literal, as Amazon 2014 has them. Raises one of PARSE_ERRORS."""
    try:
        return parse_json(text)
    except ValueError:
        return ast.literal_eval(text)


def first_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the first value of each key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in reversed(pairs):
            values[key] = value
    return values


def object_of(line: bytes, parse: Parser) -> dict[str, Any]:
    """Return the object of a line. Raises UnfitLine if it holds none."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise UnfitLine("not UTF-8", "not UTF-8; save the file as UTF-8") from None
    try:
        value = parse(text)
    except PARSE_ERRORS:
        raise UnfitLine("no JSON object", f"expected a JSON object, found {shortened(text.strip())}") from None
    if not isinstance(value, dict):
        raise UnfitLine("no JSON object", f"expected a JSON object, found {shortened(text.strip())}")
    return value


def shortened(text: str) -> str:
    """Return the beginning of a text for a message, control characters as escapes."""
    return repr(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")


def shown_value(value: object) -> str:
    """Return the beginning of a value's JSON text for a message."""
    text = SURROGATE.sub("?", json.dumps(value, default=str, ensure_ascii=False))
    return text[:SHOWN] + ("…" if len(text) > SHOWN else "")


def paths_in(value: Mapping[str, Any], before: Keys = ()) -> Iterator[Keys]:
    """Yield the paths of all values in an object, also of those in objects within it or in lists of objects."""
    for key, inner in value.items():
        path = (*before, str(key))
        yield path
        if isinstance(inner, dict):
            yield from paths_in(inner, path)
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            yield from paths_in(inner[0], path)


def value_at(value: Any, path: Keys) -> Any:
    """Return the value at a path in an object, None if it is missing. A list on the way gives a list of values."""
    for depth, key in enumerate(path):
        if isinstance(value, list):
            return [value_at(inner, path[depth:]) for inner in value]
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


class ObjectRows:
    """Rows of values of objects, checked one by one and collected by column."""

    def __init__(self, paths: Mapping[str, Keys], bad_rows: BadRows) -> None:
        """Start without rows. paths: {new name of a column: keys of its values}."""
        self.paths = paths
        self.bad_rows = bad_rows
        self._places: list[int] = []
        self._rows: list[list[Any]] = []

    def add(self, place: int, value: Mapping[str, Any]) -> None:
        """Add the row of an object, or a bad row if a value of it fits no column.

        Raises InputError as `bad_rows` says.
        """
        row = [value_at(value, path) for path in self.paths.values()]
        for name, entry in zip(self.paths, row, strict=True):
            if not fits_column(name, entry):
                expected = EXPECTED.get(name, "a number or text")
                problem = f"{name}: expected {expected}, found {shown_value(entry)}"
                self.bad_rows.add(f"bad {name}", [place], problem)
                return
        self._places.append(place)
        self._rows.append(row)

    def frame(self) -> pl.DataFrame:
        """Return the rows, with the column `place`, and start anew."""
        columns = [column_of(name, [row[at] for row in self._rows]) for at, name in enumerate(self.paths)]
        frame = pl.DataFrame([*columns, pl.Series("place", self._places, pl.Int64)])
        self._places = []
        self._rows = []
        return frame


def column_of(name: str, values: list[Any]) -> pl.Series:
    """Return a column of values that fit: text, Int64 or Float64, or a list of these if one value is a list."""
    if not any(isinstance(value, list) for value in values):
        return _plain_column(name, values)
    lists = [value if isinstance(value, list) or value is None else [value] for value in values]
    inner = _plain_column(name, [value for items in lists if items for value in items])
    counts = pl.Series("row", [row for row, items in enumerate(lists) for _ in items or ()], pl.UInt32)
    grouped = pl.DataFrame([counts, inner]).group_by("row", maintain_order=True).agg(name)
    rows = pl.DataFrame({"row": pl.Series(range(len(lists)), dtype=pl.UInt32)})
    whole = rows.join(grouped, on="row", how="left", maintain_order="left")[name]
    empty = pl.Series([items is not None and not items for items in lists], dtype=pl.Boolean)
    return whole.zip_with(~empty, pl.Series([[]], dtype=whole.dtype)).alias(name)


def fits_column(name: str, value: Any) -> bool:
    """Return True if a value can stand in the column of a new name, alone or in a list."""
    if isinstance(value, list) and name != "user":
        return all(not isinstance(inner, list) and inner is not None and fits_column(name, inner) for inner in value)
    if value is None or isinstance(value, str):
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or name not in ID_COLUMNS or (value.is_integer() and abs(value) < EXACT_FLOAT)


def text_of(name: str, value: Any) -> str | None:
    """Return a value of the column of a new name as text, None for None. Half a character becomes NUL, as in polars."""
    if value is None:
        return None
    if isinstance(value, float) and name in ID_COLUMNS:
        return str(int(value))  # pandas writes the id 7 as 7.0 if its column has missing ids
    return SURROGATE.sub("\0", value) if isinstance(value, str) else repr(value)


def _plain_column(name: str, values: list[Any]) -> pl.Series:
    """Return a column of text, whole numbers, numbers and None, as exact as they are."""
    kinds = {type(value) for value in values if value is not None}
    if name not in TEXT_COLUMNS:
        largest = max((abs(value) for value in values if isinstance(value, int)), default=0)
        if kinds == {int} and largest < 2**63:
            return pl.Series(name, values, pl.Int64)
        if kinds == {float} or (kinds == {int, float} and largest < EXACT_FLOAT):
            return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float64)
    return pl.Series(name, [text_of(name, value) for value in values], pl.String)
