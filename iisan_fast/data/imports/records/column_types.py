"""Take columns of any type as an import reads them: ids and titles as text, and lists of them; times as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....errors import InputError
from ...frames import exact_texts
from ..bad_rows import BadRows
from ..polars_module import pl

Keys = tuple[str, ...]  # the name of a column, and of those in its structs
TEXTS = (pl.String, pl.Categorical, pl.Enum, pl.Binary, pl.Null)
IDS = ("user", "item")
EXPECTED = {
    "user": "text or whole numbers",
    "item": "text or whole numbers, or lists of them",
    "title": "text, numbers, or lists of text",
    "timestamp": "numbers or times, or lists of them",
}


def column_paths(schema: Mapping[str, Any]) -> dict[str, Keys]:
    """Return {name with points between: names} of all columns and of those in structs and in lists of structs."""
    paths: dict[str, Keys] = {name: (name,) for name in schema}
    for name, kind in schema.items():
        inner = kind.inner if isinstance(kind, pl.List) else kind
        if isinstance(inner, pl.Struct):
            for below in column_paths({field.name: field.dtype for field in inner.fields}).values():
                keys = (name, *below)
                paths.setdefault(".".join(keys), keys)
    return paths


def value_column(schema: Mapping[str, Any], keys: Keys) -> tuple[pl.Expr, Any]:
    """Return the expression and the type of a column at names of `column_paths`."""
    expression = pl.col(keys[0])
    kind = schema[keys[0]]
    for key in keys[1:]:
        is_list = isinstance(kind, pl.List)
        struct = kind.inner if is_list else kind
        kind = next(field.dtype for field in struct.fields if field.name == key)
        if is_list:
            expression = expression.list.eval(pl.element().struct.field(key))
            kind = pl.List(kind)
        else:
            expression = expression.struct.field(key)
    return expression, kind


def refuse_unfit_type(path: Path, name: str, column: str, kind: Any) -> None:
    """Raise InputError if a column's type cannot be read under a new name."""
    is_list = isinstance(kind, (pl.List, pl.Array))
    plain = kind.inner if is_list else kind
    if name in IDS:
        fits = plain in TEXTS or plain.is_integer()
        if is_list:
            fits &= name == "item" and plain != pl.Binary
        else:
            fits |= plain.is_float() or plain.is_decimal()
    elif name == "title":
        fits = plain in TEXTS if is_list else not plain.is_nested()
    else:
        fits = plain in TEXTS or plain.is_numeric() or plain in (pl.Date, pl.Datetime)
    if not fits:
        expected = EXPECTED.get(name, "numbers or text")
        raise InputError(f"{path}: column {column!r} holds {kind}; expected {expected}")


def as_read(batch: pl.DataFrame, bad_rows: BadRows) -> pl.DataFrame:
    """Return a batch with ids and titles as text. Rows with an id that is neither are added to `bad_rows`.

    The columns have new names, and the types that `refuse_unfit_type` admits. Raises InputError as `bad_rows` says.
    """
    columns = [column if column.name == "place" else _as_read(column) for column in batch.get_columns()]
    read = pl.DataFrame(columns)
    for name in IDS:
        if name in batch.columns and (batch.schema[name].is_float() or batch.schema[name].is_decimal()):
            source = batch[name]
            missing = source.is_null() | (source.is_nan() if source.dtype.is_float() else False)
            unfit = read[name].is_null() & ~missing
            if unfit.any():
                problem = f"{name}: expected text or a whole number, found {source.filter(unfit)[0]}"
                bad_rows.add(f"bad {name}", batch["place"].filter(unfit), problem)
                batch = batch.filter(~unfit)
                read = read.filter(~unfit)
    return read


def _as_read(column: pl.Series) -> pl.Series:
    """Return a column under its new name with the type that an import reads."""
    kind = column.dtype
    if isinstance(kind, pl.Array):
        return _as_read(column.arr.to_list())
    is_list = isinstance(kind, pl.List)
    plain = kind.inner if is_list else kind
    text = pl.List(pl.String) if is_list else pl.String
    if column.name in IDS and (plain.is_float() or plain.is_decimal()):
        return exact_texts(column)
    if kind == pl.Binary:
        return _decoded(column)
    if column.name in (*IDS, "title") or plain in TEXTS or plain.is_decimal():
        return column.cast(text, strict=False)
    return column


def _decoded(column: pl.Series) -> pl.Series:
    """Return a column of bytes as text, null where they are not UTF-8."""
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError:
        texts = [None if value is None else value.decode(errors="replace") for value in column]
        return pl.Series(column.name, [None if text and "\ufffd" in text else text for text in texts], pl.String)
