"""Read features from Parquet: a column of ids, and a column of lists or one column for each number.

The features are unpacked once into a temporary file, which is memory-mapped, so that they never fill the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import FeaturesConfig
from ..errors import InputError, error_text, first_few
from ..files import refuse_irregular
from .feature_content import FeatureContent

try:
    import polars as pl
except ImportError:
    raise InputError("Parquet is read by polars, which is missing; pip install 'iisan-fast[import]'") from None

ROWS_AT_ONCE = 16_384  # that are unpacked at a time
# Columns that hold item ids, in small letters without underscores.
NAMES_OF_IDS = ("itemid", "item", "id", "iid", "productid", "asin", "parentasin", "articleid", "movieid", "videoid")
NOT_FEATURES = ("__index_level_0__",)  # the index that pandas adds


def open_parquet(config: FeaturesConfig, path: Path) -> FeatureContent:
    """Unpack the features of a Parquet file, or of all .parquet files in a folder, in the order of their names.

    Raises InputError if the files cannot be read, or if their columns do not say which of them hold ids and features.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected .parquet files in the folder, found none")
    for file in files:
        refuse_irregular(file)
    try:
        frame = pl.scan_parquet(files)
        schema = dict(frame.collect_schema())
        id_column = _id_column(config, schema)
        columns = _feature_columns(config, schema, id_column)
        ids = None
        if id_column is not None:
            ids = _ids(frame.select(id_column).collect()[id_column], f"{path}: column {id_column!r}")
        rows = frame.select(pl.len()).collect().item()
        names = [f"row {row}" for row in range(rows)] if ids is None else [f"item {name!r}" for name in ids]
        first = schema[columns[0]]
        is_float16 = (
            all(_number(schema[column]) == pl.Float16 for column in columns) if hasattr(pl, "Float16") else False
        )
        dtype = np.dtype("float16" if is_float16 else "float32")
        unpack = _unpacked_lists if first.is_nested() else _unpacked_columns
        with tempfile.TemporaryFile() as file:
            shape: tuple[int, ...] | None = None
            for start in range(0, rows, ROWS_AT_ONCE):
                part = frame.select(columns).slice(start, ROWS_AT_ONCE).collect()
                array = unpack(part, shape, names[start : start + ROWS_AT_ONCE], path)
                shape = array.shape[1:]
                array.astype(dtype).tofile(file)
            file.flush()
            if shape is None:
                raise InputError(f"{path}: expected features, found no row")
            array = np.memmap(file, dtype, "r", 0, (rows, *shape))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from None
    return FeatureContent(array, torch.float16 if dtype == np.float16 else torch.float32, ids)


def _id_column(config: FeaturesConfig, schema: dict[str, Any]) -> str | None:
    """Return the column of item ids; None if there are lists of numbers alone. Raises InputError if not certain."""
    path = config.path
    text_kinds = (pl.String, pl.Categorical, pl.Enum)
    texts = [name for name, kind in schema.items() if kind in text_kinds]
    fitting = [name for name, kind in schema.items() if kind.is_integer() or kind in text_kinds]
    if config.id_column is not None:
        if config.id_column not in fitting:
            raise InputError(
                f"{path}: id_column: expected a column of text or whole numbers, found {config.id_column!r}; "
                f"there are {first_few(fitting, len(fitting), 10) or 'none'}"
            )
        return config.id_column
    names = {name: name.lower().replace("_", "") for name in fitting}
    known = [name for name, plain in names.items() if plain in NAMES_OF_IDS]
    best = [name for name in known if names[name] == "itemid"] or known
    candidates = best or texts
    if not candidates and all(kind.is_nested() for kind in schema.values()):
        return None
    if len(candidates) != 1:
        shown = candidates or list(schema)
        raise InputError(
            f"{path}: expected one column of item ids, found {first_few(shown, len(shown), 10)}; name it by "
            "id_column=NAME"
        )
    return candidates[0]


def _feature_columns(config: FeaturesConfig, schema: dict[str, Any], id_column: str | None) -> list[str]:
    """Return the column of lists, or all columns of numbers beside the ids. Raises InputError if it is not certain."""
    lists = [name for name, kind in schema.items() if kind.is_nested() and _number(kind) is not None]
    if config.column is not None:
        if config.column not in lists:
            available = first_few(lists, len(lists), 10) or "none"
            raise InputError(
                f"{config.path}: column: expected a column of lists of numbers, found {config.column!r}; "
                f"there are {available}"
            )
        return [config.column]
    if len(lists) > 1:
        raise InputError(
            f"{config.path}: expected one column of features, found {first_few(lists, len(lists), 10)}; name it by "
            "column=NAME"
        )
    if lists:
        return lists
    others = [name for name in schema if name not in (id_column, *NOT_FEATURES)]
    unfit = [name for name in others if not schema[name].is_numeric()]
    if unfit or not others:
        problem = f"column {unfit[0]!r} of {schema[unfit[0]]}" if unfit else "the ids alone"
        raise InputError(
            f"{config.path}: expected a column of lists, or columns of numbers beside the ids, found {problem}"
        )
    return others


def _number(kind: Any) -> Any:
    """Return the dtype of the numbers in a column, in its lists, or in lists of lists; None if they are no numbers."""
    for _ in range(2):
        if isinstance(kind, (pl.List, pl.Array)):
            kind = kind.inner
    return kind if kind is not None and kind.is_numeric() else None


def _ids(column: pl.Series, where: str) -> list[str]:
    """Return ids as text. Raises InputError for an empty one."""
    ids = column.cast(pl.String).to_list()
    if None in ids:
        raise InputError(f"{where}: expected an id in each row, found none in row {ids.index(None)}")
    return ids


def _unpacked_columns(
    part: pl.DataFrame, shape: tuple[int, ...] | None, names: Sequence[str], path: Path
) -> np.ndarray:
    """Return columns of numbers as an array [N, 1, D]. names: of the rows. Raises InputError for an empty cell."""
    for column in part.iter_columns():
        if column.null_count():
            row = int(column.is_null().arg_max() or 0)
            raise InputError(f"{path}: column {column.name!r}, {names[row]}: expected a number, found none")
    return part.cast(pl.Float32).to_numpy()[:, None]


def _unpacked_lists(part: pl.DataFrame, shape: tuple[int, ...] | None, names: Sequence[str], path: Path) -> np.ndarray:
    """Return a column of lists, or of lists of lists, as an array [N, K, D].

    shape: (K, D) of the rows before; None for the first ones. names: of the rows. Raises InputError for a list
    that is missing or of another length.
    """
    column = part.to_series()
    levels = 2 if column.dtype.inner.is_nested() else 1
    owners = np.arange(len(column))  # the row of each list
    sizes: list[int] = []
    for level in range(levels):
        if isinstance(column.dtype, pl.Array):
            column = column.arr.to_list()
        lengths = column.list.len().fill_null(0).to_numpy()
        expected = int(lengths[0]) if shape is None else shape[level - levels]
        if not expected or (lengths != expected).any():
            place = int(np.argmax((lengths != expected) | (lengths == 0)))
            raise InputError(
                f"{path}: {names[owners[place]]}: expected {expected or 'one or more'} numbers or lists, as "
                f"of the items before, found {lengths[place]}"
            )
        sizes.append(expected)
        owners = np.repeat(owners, expected)
        column = column.explode()
    if column.null_count():
        raise InputError(f"{path}: {names[owners[int(column.is_null().arg_max() or 0)]]}: a number is missing")
    return column.cast(pl.Float32).to_numpy().reshape(-1, sizes[0] if levels == 2 else 1, sizes[-1])


def _one_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(error_text(error).splitlines()), "") or type(error).__name__
