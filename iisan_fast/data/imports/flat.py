"""Imports from tables of interactions, CSV or Parquet, and an optional table of titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import InputError
from ...files import whole_folder
from .bad_rows import BadRows
from .dataset import write_dataset
from .delimited import DelimitedText
from .interactions import read_interactions
from .opening import TextForm, open_table
from .options import TABLE_COLUMNS, Imported, TableOptions
from .parquet import ParquetTable
from .table import InteractionSource, Table
from .titles import read_titles


def import_csv(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a CSV file, which gzip may have compressed. Raises InputError for bad input.

    It has a header, unless the options name its columns.
    """
    interactions = DelimitedText(source, columns=options.columns)
    return import_tables([interactions], _items_table(options), destination, options)


def import_parquet(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a Parquet file. Raises InputError for bad input."""
    return import_tables([ParquetTable(source)], _items_table(options), destination, options)


def import_tables(
    tables: Sequence[Table],
    items: Table | None,
    destination: Path,
    options: TableOptions,
    names: tuple[str, str] = TABLE_COLUMNS,
) -> Imported:
    """Make a dataset from tables of interactions and one of titles; `destination` appears when it is whole.

    names: the columns of users and items that are used if the options name none. Raises InputError for bad input.
    """
    user = options.user_column or names[0]
    item = options.item_column or names[1]
    columns = {"user": user, "item": item, "timestamp": options.timestamp_column}
    if len({*columns.values()}) < len(columns):
        meanings = ", ".join(f"{name}: {column}" for name, column in columns.items())
        raise InputError(
            f"one column has two meanings ({meanings}); name a column each for users, items and timestamps"
        )
    with whole_folder(destination) as folder:
        sources = [
            InteractionSource(table, columns, BadRows(table.path, options.bad_rows, table.unit)) for table in tables
        ]
        interactions = read_interactions(sources)
        titles: dict[str, str] = {}
        bad_title_rows = {}
        if items is not None:
            bad_titles = BadRows(items.path, options.bad_rows, items.unit)
            titles = read_titles(items, item, options.title_column, {*interactions["item"].unique()}, bad_titles)
            bad_title_rows = bad_titles.kinds
        imported = write_dataset(folder, interactions, titles, options.covers, options)
        bad_rows = [source.bad_rows for source in sources]
        return replace(
            imported,
            rows=sum(bad.good + bad.count for bad in bad_rows),
            bad_rows=bad_rows[0].kinds,
            bad_title_rows=bad_title_rows,
        )


def _items_table(options: TableOptions) -> Table | None:
    """Return the table of titles; None if the options name none. Raises InputError if it cannot be opened."""
    if options.items is None:
        return None
    return open_table(options.items, TextForm(columns=options.items_columns))
