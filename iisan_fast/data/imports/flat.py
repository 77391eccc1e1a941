"""Imports from tables of interactions, in text, JSON lines or Parquet, and an optional table of titles."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import InputError, first_few
from ...files import whole_folder
from .bad_rows import BadKind, BadRows
from .dataset import write_dataset
from .headers import IGNORED
from .interactions import read_interactions
from .opening import TextForm, open_table
from .options import TABLE_COLUMNS, Imported, TableOptions
from .table import PARTS, InteractionSource, Table
from .titles import read_titles

LOGGER = logging.getLogger(__name__)
TRAINING, VALIDATION, TEST = PARTS
TIME_NAME = re.compile(  # of a column that holds points in time, and no durations such as watch_time
    r"((unix|review|rating|event|interaction|click|view|visit|order|purchase|create|created|time)[ _-]?)*"
    r"(time|timestamp|date|datetime|at|ts)([ _-]?(s|ms|utc))?|t_dat",
    re.IGNORECASE,
)


def import_files(sources: Path | Sequence[Path], destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from files of interactions, each text, JSON lines or Parquet, in their order.

    With files of a validation or a test part in the options, the sources are the training part. Raises InputError for
    bad input.
    """
    form = TextForm(options.separator, options.encoding, options.columns)
    paths = [sources] if isinstance(sources, Path) else [*sources]
    later = {VALIDATION: options.validation, TEST: options.test}
    parts = {part: path for part, path in later.items() if path is not None}
    first = TRAINING if parts else None
    tables = [(open_table(path, form), first) for path in paths]
    tables += [(open_table(path, form), part) for part, path in parts.items()]
    return import_tables(tables, items_table(options), destination, options)


import_csv = import_parquet = import_files


def items_table(options: TableOptions) -> Table | None:
    """Return the table of titles; None if the options name none. Raises InputError if it cannot be opened."""
    if options.items is None:
        return None
    return open_table(options.items, TextForm(options.separator, options.encoding, options.items_columns))


def import_tables(
    tables: Sequence[tuple[Table, str | None]],
    items: Table | None,
    destination: Path,
    options: TableOptions,
    names: tuple[str, str] = TABLE_COLUMNS,
) -> Imported:
    """Make a dataset from tables of interactions and one of titles; `destination` appears when it is whole.

    tables: each with the one of PARTS to which its rows belong; None if a column says it, or nothing does. names: the
    columns of users and items that are used if the options name none. Raises InputError for bad input.
    """
    sources = [_source(table, part, options, names) for table, part in tables]
    with whole_folder(destination) as folder:
        interactions = read_interactions(sources)
        titles: dict[str, str] = {}
        bad_title_rows = {}
        if items is not None:
            bad_titles = BadRows(items.path, options.bad_rows, items.unit)
            item = options.item_column or names[1]
            titles = read_titles(items, item, options.title_column, {*interactions["item"].unique()}, bad_titles)
            bad_title_rows = bad_titles.kinds
        imported = write_dataset(folder, interactions, titles, options.covers, options)
        bad_rows = [source.bad_rows for source in sources]
        return replace(
            imported,
            rows=sum(bad.good + bad.count for bad in bad_rows),
            bad_rows=_all_kinds(bad_rows),
            bad_title_rows=bad_title_rows,
        )


def _source(table: Table, part: str | None, options: TableOptions, names: tuple[str, str]) -> InteractionSource:
    """Return a table with the columns to read. Raises InputError if one column has two meanings."""
    columns = {"user": options.user_column or names[0], "item": options.item_column or names[1]}
    optional = {"timestamp": _time_column(table, options, columns.values())}
    if part is None:
        optional["part"] = _column_or_default(options.split_column, "split", table)
    if options.min_rating is not None:
        optional["rating"] = options.rating_column or "rating"
    columns |= {name: column for name, column in optional.items() if column is not None}
    if len({*columns.values()}) < len(columns):
        meanings = ", ".join(f"{name}: {column}" for name, column in columns.items())
        raise InputError(f"one column has two meanings ({meanings}); name a column of its own for each")
    bad_rows = BadRows(table.path, options.bad_rows, table.unit)
    return InteractionSource(table, columns, bad_rows, part, options.item_separator)


def _time_column(table: Table, options: TableOptions, ids: Iterable[str]) -> str | None:
    """Return the column of times, None if there is none, with a warning. ids: the columns of ids.

    Raises InputError if no column is named, and one that looks like times has another name than the default.
    """
    column = _column_or_default(options.timestamp_column, "timestamp", table)
    if column is not None or options.timestamp_column is not None or not {*ids} <= {*table.columns}:
        return column
    other = next((name for name in table.columns if TIME_NAME.fullmatch(name)), None)
    if other is not None:
        raise InputError(
            f"{table.path}: no column 'timestamp', but {other!r}; name the column of the times, or - to keep the order "
            "of the file"
        )
    available = first_few(table.columns, len(table.columns), limit=10)
    LOGGER.warning("%s: no times among its columns (%s): the order of the file is kept", table.path, available)
    return None


def _column_or_default(column: str | None, default: str, table: Table) -> str | None:
    """Return a column that a user names, None for none; the default one, if it is there, if the user names nothing."""
    if column is None:
        return default if default in table.columns else None
    return None if column in IGNORED else column


def _all_kinds(bad_rows: Sequence[BadRows]) -> dict[str, BadKind]:
    """Return the rows that were left out by kind; of several files, each kind with its file."""
    if len(bad_rows) == 1:
        return bad_rows[0].kinds
    return {f"{name} of {bad.path.name}": kind for bad in bad_rows for name, kind in bad.kinds.items()}
