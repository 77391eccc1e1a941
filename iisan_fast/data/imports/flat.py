"""Imports from tables of interactions, in text, JSON lines or Parquet, and an optional table of titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import InputError
from ...files import whole_folder
from .bad_rows import BadRows
from .opening import TextForm, open_table
from .options import TABLE_COLUMNS, Imported, TableOptions
from .rows.interaction_columns import interaction_source
from .rows.interactions import count_rows, read_interactions
from .rows.titles import Titles, read_titles
from .table import PARTS, Table
from .text.history_lines import HistoryLines
from .text.separators import separator_of
from .writing.dataset import write_dataset

TRAINING, VALIDATION, TEST = PARTS


def import_files(sources: Path | Sequence[Path], destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from files of interactions, each text, JSON lines or Parquet, in their order.

    With files of a validation or a test part in the options, the sources are the training part. Raises InputError for
    bad input.
    """
    paths = [sources] if isinstance(sources, Path) else [*sources]
    later = {VALIDATION: options.validation, TEST: options.test}
    parts = {part: path for part, path in later.items() if path is not None}
    first = TRAINING if parts else None
    tables = [(_interactions_table(path, options), first) for path in paths]
    tables += [(_interactions_table(path, options), part) for part, path in parts.items()]
    return import_tables(tables, items_table(options), destination, options)


def _interactions_table(path: Path, options: TableOptions) -> Table:
    """Return a table of interactions; lines of a user and items, if one separator stands between all of these.

    Raises InputError if it cannot be opened.
    """
    separator = options.separator
    if separator is not None and options.item_separator is not None and options.columns is not None:
        is_file = not path.is_dir()
        if is_file and separator_of(separator) == separator_of(options.item_separator):
            return HistoryLines(path, separator, options.columns, options.encoding)
    return open_table(path, TextForm(separator, options.encoding, options.columns))


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
            item_column = options.items_id_column or options.item_column or names[1]
            item_ids = {*interactions["item"].unique()}
            titles = read_titles(items, item_column, options.title_column, item_ids, bad_titles)
            bad_title_rows = bad_titles.kinds
            if titles.other_ids and options.items is not None:
                raise InputError(f"{titles.problem}; write both alike, or leave out --items")
        imported = write_dataset(folder, interactions, titles, options.covers, options)
        return replace(count_rows(imported, sources), bad_title_rows=bad_title_rows)
