"""Imports from a table of interactions, CSV or Parquet, and an optional table of titles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import InputError
from ...files import whole_folder
from .bad_rows import BadRows
from .dataset import write_dataset
from .delimited import DelimitedText
from .options import TABLE_COLUMNS, Imported, TableOptions
from .parquet import ParquetTable
from .tables import Table, read_interactions, read_titles

PARQUET_SUFFIXES = (".parquet", ".pq")


def import_csv(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a CSV file, which gzip may have compressed. Raises InputError for bad input.

    It has a header, unless the options name its columns.
    """
    interactions = DelimitedText(source, columns=options.columns)
    return import_table(interactions, _items_table(options), destination, options)


def import_parquet(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a Parquet file. Raises InputError for bad input."""
    return import_table(ParquetTable(source), _items_table(options), destination, options)


def import_table(
    interactions: Table,
    items: Table | None,
    destination: Path,
    options: TableOptions,
    names: tuple[str, str] = TABLE_COLUMNS,
) -> Imported:
    """Make a dataset from a table of interactions and one of titles; `destination` appears when it is whole.

    names: the columns of users and items that are used if the options name none. Raises InputError for bad input.
    """
    user = options.user_column or names[0]
    item = options.item_column or names[1]
    columns = {"user": user, "item": item, "timestamp": options.timestamp_column}
    if len({*columns.values()}) < len(columns):
        names = ", ".join(f"{name}: {column}" for name, column in columns.items())
        raise InputError(f"one column has two meanings ({names}); name a column each for users, items and timestamps")
    with whole_folder(destination) as folder:
        bad_rows = BadRows(interactions.path, options.bad_rows, interactions.unit)
        table = read_interactions(interactions, columns, bad_rows)
        titles: dict[str, str] = {}
        bad_title_rows = {}
        if items is not None:
            bad_titles = BadRows(items.path, options.bad_rows, items.unit)
            titles = read_titles(items, item, options.title_column, {*table["item"].unique()}, bad_titles)
            bad_title_rows = bad_titles.kinds
        imported = write_dataset(folder, table, titles, options.covers, options)
        rows = bad_rows.good + bad_rows.count
        return replace(imported, rows=rows, bad_rows=bad_rows.kinds, bad_title_rows=bad_title_rows)


def _items_table(options: TableOptions) -> Table | None:
    """Return the table of titles, Parquet or CSV by its suffix; None if the options name none.

    Raises InputError if it cannot be opened, and for names of columns of a Parquet file, which has its own.
    """
    if options.items is None:
        return None
    if options.items.suffix not in PARQUET_SUFFIXES:
        return DelimitedText(options.items, columns=options.items_columns)
    if options.items_columns is not None:
        raise InputError(f"{options.items}: items_columns: a Parquet file has names of its own; leave them out")
    return ParquetTable(options.items)
