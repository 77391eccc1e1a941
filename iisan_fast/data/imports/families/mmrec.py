"""Imports of MMRec's datasets: NAME.inter with a part of a split in each row, and features of the items beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ....errors import InputError
from ..flat import import_tables, items_table
from ..options import Imported, TableOptions
from ..text.delimited import DelimitedText
from .sources import find, unpacked

USER, ITEM, PART = "userID", "itemID", "x_label"


def import_mmrec(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a folder of MMRec. Titles come from meta-*.csv, if it is there, or as the options say.

    The column x_label is a given split: 0 is training, 1 validation, 2 test. Raises InputError for bad input.
    """
    folder = source if unpacked(source).is_dir() else source.parent
    inter = find(folder, "*.inter") if source.is_dir() else source
    if inter is None:
        raise InputError(f"{folder}: expected a .inter file in it, found none")
    table = DelimitedText(inter, "\t", quoted=False)
    if USER not in table.columns and any(":" in name for name in table.columns):
        raise InputError(f"{inter}: has a header with types, as RecBole's; use iisan-fast import recbole")
    has_times = "timestamp" in table.columns
    options = replace(
        options,
        timestamp_column="timestamp" if has_times else "-",
        split_column=PART if PART in table.columns else "-",
        items=options.items or find(folder, "meta-*.csv", "meta_*.csv"),
    )
    return import_tables([(table, None)], items_table(options), destination, options, (USER, ITEM))
