"""Imports from a table of interactions, CSV or Parquet, and an optional table of titles."""

from __future__ import annotations

from pathlib import Path

from ...files import whole_folder
from .dataset import write_dataset
from .options import TABLE_COLUMNS, Imported, TableOptions
from .tables import Table, csv_table, parquet_table, read_interactions, read_titles

PARQUET_SUFFIXES = (".parquet", ".pq")


def import_csv(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a CSV file with a header, which gzip may have compressed. Raises InputError for bad input."""
    return import_table(csv_table(source), _items_table(options.items), destination, options)


def import_parquet(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a Parquet file. Raises InputError for bad input."""
    return import_table(parquet_table(source), _items_table(options.items), destination, options)


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
    with whole_folder(destination) as folder:
        titles = read_titles(items, item, options.title_column) if items else {}
        return write_dataset(folder, read_interactions(interactions, columns), titles, options.covers, options)


def _items_table(path: Path | None) -> Table | None:
    """Return the table of titles, Parquet or CSV by its suffix; None without a path."""
    if path is None:
        return None
    return parquet_table(path) if path.suffix in PARQUET_SUFFIXES else csv_table(path)
