"""Take tables from Python: frames of pandas, polars or arrow, and lists of dicts, with ids as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_few

if TYPE_CHECKING:
    import polars as pl

ID_COLUMNS = ("user_id", "item_id")
HISTORY_COLUMN = "history"  # a list of item ids in each row, or ids joined by spaces
EXACT_FLOAT = 2**53  # a larger float may not be the number that was written
EXPECTED_ID = "expected text or a whole number"

Place = Callable[[int], str]  # from a row's number, from 0, to its name in a message


def as_polars(frame: object, where: str) -> pl.DataFrame:
    """Return a table as a polars frame in which all ids are text.

    frame: a frame of polars, pandas or pyarrow, another object with `__arrow_c_stream__` or `__dataframe__`, or a list
    of dicts. where: what messages call it. The ids are the columns `user_id`, `item_id` and, in lists, `history`; whole
    numbers in them become decimal text. Categories become text in every column.

    Raises InputError for another type, for an id that is missing or is neither text nor a whole number, naming the row,
    and if polars is missing.
    """

    def place(row: int) -> str:
        return f"{where} row {row + 1}"

    if isinstance(frame, (list, tuple)):
        return frame_of_records(frame, where, place)
    return with_text_ids(_converted(frame, where), place)


def frame_of_records(records: Sequence[object], where: str, place: Place) -> pl.DataFrame:
    """Return dicts as a polars frame in which all ids are text; a key that a dict lacks is null there.

    Raises InputError as `as_polars` does, and for values of one key whose types do not fit together.
    """
    from .imports.polars_module import pl

    rows = [_record_with_text_ids(record, place(row)) for row, record in enumerate(records)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            column = pl.Series(name, values, dtype=pl.String if name in ID_COLUMNS else None)
        except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: {name}: its values are no column ({_first_line(error)})") from None
        if column.dtype == pl.Object:
            raise InputError(f"{where}: {name}: expected text, numbers or lists, found {_type_of_first(values)}")
        columns.append(column)
    return with_text_ids(pl.DataFrame(columns), place)


def with_text_ids(frame: pl.DataFrame, place: Place) -> pl.DataFrame:
    """Return a frame whose ids are text and whose categories are text.

    Raises InputError, naming the row by `place`, for an id that is missing or is neither text nor a whole number.
    """
    from .imports.polars_module import pl

    columns = []
    for column in frame.get_columns():
        if column.dtype in (pl.Categorical, pl.Enum):
            column = column.cast(pl.String)
        if column.name in ID_COLUMNS:
            column = _text_ids(column, place)
        elif column.name == HISTORY_COLUMN and column.dtype in (pl.List, pl.Array):
            column = _text_histories(column, place)
        columns.append(column)
    return pl.DataFrame(columns)


def text_id(value: object, where: str) -> str:
    """Return one id as text. Raises InputError, naming `where`, if it is neither text nor a whole number."""
    if isinstance(value, str):
        return value
    if value is not None and not isinstance(value, (bool, bytes)):
        try:
            if value == int(value) and (not isinstance(value, float) or abs(value) < EXACT_FLOAT):  # type: ignore[call-overload]
                return str(int(value))  # type: ignore[call-overload]
        except (TypeError, ValueError, OverflowError):
            pass
    raise InputError(f"{where}: {EXPECTED_ID}, found {_shown(value)}")


def exact_texts(column: pl.Series) -> pl.Series:
    """Return a column as text, null where a value is neither text nor a whole number."""
    from .imports.polars_module import pl

    kind = column.dtype
    if kind in (pl.Categorical, pl.Enum) or kind == pl.String or kind.is_integer():
        return column.cast(pl.String)
    if kind.is_float():
        whole = column.cast(pl.Int64, strict=False)
        exact = (whole.cast(kind) == column) & (column.abs() < EXACT_FLOAT)
        return whole.set(~exact.fill_null(False), None).cast(pl.String)
    if kind.is_decimal():
        return column.cast(pl.String).str.extract(r"^(-?[0-9]+)(?:\.0*)?$", 1)
    return pl.Series(column.name, [None] * len(column), dtype=pl.String)


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Raise InputError if two columns have one name."""
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise InputError(f"{where}: two columns are named {repeated[0]!r}; give each column another name")


def _converted(frame: object, where: str) -> pl.DataFrame:
    """Return a frame of any library as a polars frame. Raises InputError if it is none, or cannot be converted."""
    from .imports.polars_module import pl

    if isinstance(frame, pl.DataFrame):
        return frame
    pandas = sys.modules.get("pandas")
    expected = "expected a frame of pandas, polars or pyarrow, or a list of dicts"
    try:
        if isinstance(frame, pl.LazyFrame):
            return frame.collect()
        if pandas is not None and isinstance(frame, pandas.DataFrame):
            return _pandas_columns(frame, where)
        if hasattr(frame, "__arrow_c_stream__"):
            refuse_repeated(getattr(frame, "column_names", ()), where)
            return pl.DataFrame(frame)
        if hasattr(frame, "__dataframe__"):
            from pyarrow.interchange import from_dataframe

            return pl.DataFrame(from_dataframe(frame))
    except ImportError as error:
        hint = "pip install pyarrow, or pass a polars frame or a list of dicts"
        raise InputError(f"{where}: cannot be converted ({_first_line(error)}); {hint}") from None
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        kind = type(frame).__name__
        raise InputError(f"{where}: {expected}, found {kind}, which is no table ({_first_line(error)})") from None
    raise InputError(f"{where}: {expected}, found {type(frame).__name__}")


def _pandas_columns(frame: Any, where: str) -> pl.DataFrame:
    """Return a frame of pandas, without its index, as a polars frame.

    Raises InputError, naming the column, for two columns of one name, and for values of several types.
    """
    from .imports.polars_module import pl

    names = [str(name) for name in frame.columns]
    refuse_repeated(names, where)
    columns = []
    for number, name in enumerate(names):
        try:
            columns.append(pl.from_pandas(frame.iloc[:, number]).alias(name))
        except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
            hint = "give them one type"
            raise InputError(f"{where}: {name}: its values are no column ({_first_line(error)}); {hint}") from None
    return pl.DataFrame(columns)


def _record_with_text_ids(record: object, where: str) -> dict[str, Any]:
    """Return a dict with its ids as text. Raises InputError if it is no dict of names, or for an unfit id."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected a dict of column names and values, found {type(record).__name__}")
    other = [name for name in record if not isinstance(name, str)]
    if other:
        raise InputError(f"{where}: expected text as column names, found {first_few(map(repr, other), len(other))}")
    row = dict(record)
    for name in ID_COLUMNS:
        if name in row:
            row[name] = text_id(row[name], f"{where}: {name}")
    history = row.get(HISTORY_COLUMN)
    if history is not None and not isinstance(history, str):
        if not isinstance(history, Sequence):
            kind = type(history).__name__
            raise InputError(
                f"{where}: {HISTORY_COLUMN}: expected a list of ids, or ids joined by spaces, found {kind}"
            )
        row[HISTORY_COLUMN] = [text_id(value, f"{where}: {HISTORY_COLUMN}") for value in history]
    return row


def _text_ids(column: pl.Series, place: Place) -> pl.Series:
    """Return a column of ids as text. Raises InputError, naming the row, as `with_text_ids` does."""
    texts = exact_texts(column)
    unfit = texts.is_null()
    if unfit.any():
        row = int(unfit.arg_max() or 0)
        raise InputError(f"{place(row)}: {column.name}: {EXPECTED_ID}, found {_shown(column[row])}")
    return texts


def _text_histories(column: pl.Series, place: Place) -> pl.Series:
    """Return a column of lists of ids as lists of text; a missing list stays missing. Raises as `_text_ids` does."""
    from .imports.polars_module import pl

    lists = column.arr.to_list() if column.dtype == pl.Array else column
    rows = pl.Series("row", range(len(lists)), dtype=pl.UInt32)
    filled = pl.DataFrame([rows, lists.alias("id")]).filter(pl.col("id").list.len() > 0).explode("id")
    numbers = filled["row"]
    ids = _text_ids(filled["id"].alias(column.name), lambda row: place(numbers[row]))
    joined = pl.DataFrame([numbers, ids.alias("id")]).group_by("row", maintain_order=True).agg("id")
    whole = pl.DataFrame([rows]).join(joined, on="row", how="left", maintain_order="left")["id"]
    empty = pl.Series([[]], dtype=pl.List(pl.String))
    return whole.zip_with(whole.is_not_null() | lists.is_null(), empty).alias(column.name)


def _shown(value: object) -> str:
    """Return a value for a message, "nothing" if it is missing."""
    if value is None:
        return "nothing"
    shown = repr(value)
    return shown if len(shown) < 100 else shown[:100] + "…"


def _type_of_first(values: Sequence[object]) -> str:
    """Return the name of the type of the first value that is there."""
    return next(type(value).__name__ for value in values if value is not None)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
