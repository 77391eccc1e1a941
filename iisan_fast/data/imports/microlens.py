"""Imports of MicroLens as it is published: pairs, English titles and a folder of covers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import tee
from pathlib import Path

from ...errors import InputError
from ...files import whole_folder
from .dataset import write_dataset
from .frames import pl
from .options import Imported, ImportOptions
from .tables import csv_table, find, read_interactions, titles_of

PAIR_COLUMNS = ("user", "item", "timestamp")


def import_microlens(source: Path, destination: Path, options: ImportOptions = ImportOptions()) -> Imported:
    """Makes a dataset of a folder that holds one MicroLens.

    Of its two forms of the interactions `*_pairs.csv` is taken, which has timestamps, and `*_pairs.tsv` where that is
    absent; titles from `*_title_en.csv` or `*_titles.csv`, covers from `*_covers` or `covers`, where there are any.
    Raises InputError for bad input.
    """
    with whole_folder(destination) as folder:
        pairs = find(source, "*_pairs.csv", "*_pairs.tsv")
        if pairs is None:
            raise InputError(f"{source}: expected MicroLens-*_pairs.csv or MicroLens-*_pairs.tsv in it, found neither")
        file = find(source, "*_title_en.csv", "*_titles.csv")
        titles = titles_of(file, _title_rows(file)) if file else {}
        interactions = _read_csv(pairs) if pairs.suffix == ".csv" else _read_tsv(pairs)
        return write_dataset(folder, interactions, titles, find(source, "*_covers", "covers"), options)


def _read_csv(pairs: Path) -> pl.DataFrame:
    form = {} if _has_header(pairs) else {"has_header": False, "schema": dict.fromkeys(PAIR_COLUMNS, pl.String)}
    return read_interactions(csv_table(pairs, **form), dict(zip(PAIR_COLUMNS, PAIR_COLUMNS)))


def _read_tsv(pairs: Path) -> pl.DataFrame:
    columns = PAIR_COLUMNS[:2]
    schema = dict.fromkeys(columns, pl.String)
    table = csv_table(pairs, has_header=False, separator="\t", quote_char=None, schema=schema)
    return read_interactions(table, dict(zip(columns, columns)), several_items=True)


def _has_header(pairs: Path) -> bool:
    """Return True if the first line names the columns, False if it is an interaction."""
    first = next(_rows(pairs), [])
    if {*PAIR_COLUMNS} <= {*first}:
        return True
    try:
        float(first[2])
    except (IndexError, ValueError):
        line = ",".join(first)[:100]
        raise InputError(f"{pairs} line 1: expected user,item,timestamp, found {line!r}") from None
    return False


def _title_rows(file: Path) -> Iterator[tuple[str, str]]:
    """(item id, title) of every row, commas in unquoted titles included. A header looks like one more item's."""
    return ((row[0], ",".join(row[1:])) for row in _rows(file) if row)


def _rows(file: Path) -> Iterator[list[str]]:
    """The rows of a CSV file. A line that is not valid CSV, as `7,"Up" again`, is split at its first comma."""
    lines = _lines(file)
    while True:
        lines, again = tee(lines)
        try:
            row = next(csv.reader(lines, strict=True), None)
        except csv.Error:  # perhaps lines later, where a quote was never closed
            row, lines = next(again).split(",", 1), again
        if row is None:
            return
        yield row


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file} line {number}: not UTF-8; save the file as UTF-8") from None
