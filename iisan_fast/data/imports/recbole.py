"""Imports of RecBole's atomic files: tab-separated columns under a header of names with types, as `user_id:token`."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from .flat import import_table
from .options import RECBOLE_FIELDS, Imported, TableOptions
from .tables import Table, csv_table, find


def import_recbole(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a .inter file, or from a folder that holds one.

    Titles come from the .item file of the same name, if there is one. The options name fields without their types.
    Raises InputError for bad input.
    """
    inter = find(source, "*.inter") if source.is_dir() else source
    if inter is None:
        raise InputError(f"{source}: expected a .inter file in it, found none")
    beside = inter.with_suffix(".item")
    items = options.items or (beside if beside.is_file() else None)
    return import_table(_atomic(inter), _atomic(items) if items else None, destination, options, RECBOLE_FIELDS)


def _atomic(path: Path) -> Table:
    """Return the table of an atomic file, its columns named without their types."""
    return csv_table(path, separator="\t", quote_char=None, with_column_names=_without_types)


def _without_types(header: list[str]) -> list[str]:
    """Return the names of fields such as `user_id:token` without their types."""
    return [field.partition(":")[0] for field in header]
