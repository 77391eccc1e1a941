"""Imports of the Amazon reviews of 2014, 2018 and 2023: reviews, ratings alone, and the benchmarks of 2023."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ....errors import InputError, first_few
from ..bad_rows import BadRows
from ..flat import import_tables, items_table
from ..opening import TextForm, open_table
from ..options import Imported, TableOptions
from ..table import Table
from ..text.delimited import DelimitedText
from .listed_histories import PART, ListedHistories
from .sources import in_natural_order, unpacked, with_parts

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
META = "meta_"  # what the name of a file of products starts with
EXAMPLE = "NAME.train.csv, NAME.valid.csv and NAME.test.csv"
NAMES = {
    "user": ("user_id", "reviewerID"),
    "item": ("parent_asin", "asin"),
    "timestamp": ("timestamp", "unixReviewTime"),
}
HISTORY = "history"  # the items before, in the benchmarks with histories
ASIN = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")  # users have longer ids
LOOKED_AT = 10_000  # rows without a header


def import_amazon(
    sources: Path | Sequence[Path], destination: Path, options: TableOptions = TableOptions()
) -> Imported:
    """Make a dataset from files of reviews or ratings, or from folders that hold them.

    Files whose names start with meta_ are products with titles; the options may name another one. NAME.train.csv,
    NAME.valid.csv and NAME.test.csv are a given split. Raises InputError for bad input.
    """
    paths = [path for source in ([sources] if isinstance(sources, Path) else sources) for path in _files(source)]
    products = [path for path in paths if path.name.startswith(META)]
    reviews = [path for path in paths if path not in products]
    if not reviews:
        raise InputError(f"{paths[0]}: holds products; name a file of reviews or ratings, too")
    if len(products) > 1 and options.items is None:
        names = first_few((path.name for path in products), len(products))
        raise InputError(f"{products[0].parent}: expected one file of products, found {names}; name one with --items")
    if options.items is None and products:
        options = replace(options, items=products[0])
    pieces = [(path.name.removesuffix(".gz").split(".") + [""])[1] for path in reviews]
    files = with_parts(reviews[0].parent, reviews, pieces, EXAMPLE)
    items = items_table(options)
    tables = [(_open(path, items), part) for path, part in files]
    first = tables[0][0]
    names = {name: _column(first, usual) for name, usual in NAMES.items()}
    options = replace(options, timestamp_column=names["timestamp"])
    if any(part is not None for _, part in files) and not any(part == "training" for _, part in files):
        tables, options = _with_histories(tables, names["item"], options)
    return import_tables(tables, items, destination, options, (names["user"], names["item"]))


def _files(source: Path) -> list[Path]:
    """Return a file, or the files of reviews, ratings and products in a folder. Raises InputError if there is none."""
    if not unpacked(source).is_dir():
        return [source]
    files = [path for path in source.iterdir() if path.name.removesuffix(".gz").endswith(SUFFIXES) and path.is_file()]
    if not files:
        raise InputError(f"{source}: expected files of Amazon's reviews in it, such as All_Beauty.jsonl, found none")
    return sorted(files, key=in_natural_order)


def _column(table: Table, names: Sequence[str]) -> str:
    """Return the first of the names that a table has. Raises InputError if it has none."""
    column = next((name for name in names if name in table.columns), None)
    if column is None:
        available = first_few(table.columns, len(table.columns), limit=10)
        raise InputError(
            f"{table.path}: expected a column {' or '.join(names)}, found {available}; import it by iisan-fast import "
            "csv or jsonl, which name the columns"
        )
    return column


def _open(path: Path, items: Table | None) -> Table:
    """Return a table of reviews or ratings. Raises InputError if it is none of the known forms.

    items: the products; a file without a header names the item as they do.
    """
    if not path.name.removesuffix(".gz").endswith(".csv"):
        return open_table(path)
    first = DelimitedText(path, ",", columns=("-",)).first_fields()
    if any(name in first for name in NAMES["user"]):
        return open_table(path, TextForm(separator=","))
    item = "asin" if items is not None and "asin" in items.columns else "parent_asin"
    if items is not None and "parent_asin" in items.columns:
        item = "parent_asin"
    return DelimitedText(path, ",", columns=_columns_of_ratings(path, len(first), item))


def _columns_of_ratings(path: Path, fields: int, item: str) -> tuple[str, ...]:
    """Return the names of the columns of ratings without a header: 2014 has the user first, 2018 the item.

    fields: in the first line. item: the name of the column of items. Raises InputError if the rows do not say which.
    """
    if fields == 4:
        table = DelimitedText(path, ",", columns=("first", "second", "-", "-"))
        bad_rows = BadRows(path, "skip", table.unit)
        batch = next(table.batches({"first": "first", "second": "second"}, bad_rows), None)
        rows = [] if batch is None else list(islice(batch.select("first", "second").iter_rows(), LOOKED_AT))
        are_items = [all(ASIN.fullmatch(row[place] or "") for row in rows) for place in (0, 1)]
        if are_items == [False, True]:
            return ("user_id", item, "rating", "timestamp")
        if are_items == [True, False]:
            return (item, "user_id", "rating", "timestamp")
    raise InputError(
        f"{path}: expected a header with {' or '.join(NAMES['user'])}, or rows of user, item, rating and time; name "
        "the columns with iisan-fast import csv"
    )


def _with_histories(
    tables: Sequence[tuple[Table, str | None]], item: str, options: TableOptions
) -> tuple[list[tuple[Table, str | None]], TableOptions]:
    """Return the tables of a split without its training part, which the histories beside the interactions hold.

    Raises InputError if they have none.
    """
    untold = next((table for table, _ in tables if HISTORY not in table.columns), None)
    if untold is not None:
        raise InputError(f"{untold.path}: the training part of the split is missing; name it, too")
    histories: dict[str, list[str]] = {}
    listed = [ListedHistories(table, {item: HISTORY}, histories, part) for table, part in tables]
    return [(table, None) for table in listed], replace(options, timestamp_column="-", split_column=PART)
