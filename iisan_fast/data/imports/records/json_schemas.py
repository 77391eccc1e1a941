"""Choose the types by which polars reads JSON lines strictly: a value of another type is an error, never converted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..polars_module import pl
from ..rows.decimal_times import EXACT_FLOAT
from .json_values import TEXT_COLUMNS, value_at


@dataclass(frozen=True)
class JsonSchema:
    """Types of the columns of JSON lines."""

    types: Mapping[str, pl.DataType | type[pl.DataType]]  # of the keys of each object
    columns: Sequence[pl.Expr]  # the columns under their new names
    unfit: Sequence[re.Pattern[bytes]]  # polars makes text of any value; a match says that one may be no text
    floats: Sequence[str]  # new names of columns of floats

    def are_exact(self, frame: pl.DataFrame) -> bool:
        """Return True if no float may be a whole number that a float cannot hold."""
        for name in self.floats:
            column = frame[name].explode() if frame[name].dtype == pl.List else frame[name]
            largest = column.abs().max()
            if largest is not None and largest >= EXACT_FLOAT:
                return False
        return True


def schema_of(paths: Mapping[str, tuple[str, ...]], objects: Sequence[Mapping[str, Any]]) -> JsonSchema | None:
    """Return the types that fit the values of some objects, None if their values are of several types.

    paths: {new name of a column: keys from an object to its values}.
    """
    types: dict[str, Any] = {}
    columns = []
    unfit = []
    floats = []
    for name, path in paths.items():
        values = [value_at(value, path) for value in objects]
        kind = _type_of(name, values)
        if kind is None or not _add_type(types, path, kind):
            return None
        if kind == pl.String:
            key = re.escape(path[-1].encode())
            unfit.append(re.compile(rb'"' + key + rb'"\s*:\s*[^"\sn]'))
        if kind in (pl.Float64, pl.List(pl.Float64)):
            floats.append(name)
        columns.append(_column(name, path, kind))
    return JsonSchema({key: _data_type(kind) for key, kind in types.items()}, columns, unfit, floats)


def _type_of(name: str, values: Sequence[Any]) -> Any:
    """Return the type of a column's values, None if there are several."""
    lists = [value for value in values if isinstance(value, list)]
    if not lists:
        return _plain_type(name, values, pl.String)
    if any(value is not None and not isinstance(value, list) for value in values):
        return None
    inner = [value for items in lists for value in items]
    # Categories, since polars makes text of all values of a list of text.
    kind = _plain_type(name, inner, pl.Categorical(pl.Categories.random()))
    return None if kind is None else pl.List(kind)


def _plain_type(name: str, values: Sequence[Any], text: Any) -> Any:
    """Return the type of values that are no lists, None if there are several."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str}:
        return text
    if kinds == {int}:
        return pl.UInt64 if max(value for value in values if value is not None) >= 2**63 else pl.Int64
    if kinds <= {int, float} and name not in TEXT_COLUMNS:
        return pl.Float64
    return None


def _add_type(types: dict[str, Any], path: tuple[str, ...], kind: Any) -> bool:
    """Put the type of the value at a path into a tree of types; return False if another one stands there."""
    for key in path[:-1]:
        types = types.setdefault(key, {})
        if not isinstance(types, dict):
            return False
    return types.setdefault(path[-1], kind) is kind


def _data_type(kind: Any) -> Any:
    """Return a tree of types as one type."""
    if isinstance(kind, dict):
        return pl.Struct({key: _data_type(inner) for key, inner in kind.items()})
    return kind


def _column(name: str, path: tuple[str, ...], kind: Any) -> pl.Expr:
    """Return the expression of a column under its new name."""
    column = pl.col(path[0])
    for key in path[1:]:
        column = column.struct.field(key)
    if isinstance(kind, pl.List):
        is_text = name in TEXT_COLUMNS or isinstance(kind.inner, pl.Categorical)
        return (column.cast(pl.List(pl.String)) if is_text else column).alias(name)
    return (column.cast(pl.String) if name in TEXT_COLUMNS else column).alias(name)
