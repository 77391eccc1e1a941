"""Imports from tables of interactions, in text, JSON lines or Parquet, and an optional table of titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...files import whole_folder
from .bad_rows import BadRows
from .dataset import write_dataset
from .interaction_columns import interaction_source
from .interactions import count_rows, read_interactions
from .opening import TextForm, open_table
from .options import TABLE_COLUMNS, Imported, TableOptions
from .table import PARTS, Table
from .titles import Titles, read_titles

TRAINING, VALIDATION, TEST = PARTS


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
    form = TextForm(None, options.encoding, options.items_columns, usual_separator=options.separator)
    return open_table(options.items, form)


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
    sources = [interaction_source(table, options, names, part) for table, part in tables]
    with whole_folder(destination) as folder:
        interactions = read_interactions(sources, options)
        titles = Titles()
        bad_title_rows = {}
        if items is not None:
            bad_titles = BadRows(items.path, options.bad_rows, items.unit)
            item_column = options.item_column or names[1]
            item_ids = {*interactions["item"].unique()}
            titles = read_titles(items, item_column, options.title_column, item_ids, bad_titles)
            bad_title_rows = bad_titles.kinds
        imported = write_dataset(folder, interactions, titles, options.covers, options)
        return replace(count_rows(imported, sources), bad_title_rows=bad_title_rows)
