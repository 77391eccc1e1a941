"""Imports of MicroLens in its published form: pairs, English titles and a folder of covers."""

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
    """Make a dataset from a folder that holds one MicroLens.

    Interactions come from `*_pairs.csv`, which has timestamps, or from `*_pairs.tsv` if that is absent. Titles come
    from `*_title_en.csv` or `*_titles.csv`, covers from `*_covers` or `covers`; both may be absent. Raises InputError
    for bad input.
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
    """Read the interactions of a CSV file with or without a header, as `read_interactions` returns them."""
    form = {} if _has_header(pairs) else {"has_header": False, "schema": dict.fromkeys(PAIR_COLUMNS, pl.String)}
    return read_interactions(csv_table(pairs, **form), dict(zip(PAIR_COLUMNS, PAIR_COLUMNS)))


def _read_tsv(pairs: Path) -> pl.DataFrame:
    """Read the interactions of lines of a user, a tab, and items with spaces between."""
    columns = PAIR_COLUMNS[:2]
    schema = dict.fromkeys(columns, pl.String)
    table = csv_table(pairs, has_header=False, separator="\t", quote_char=None, schema=schema)
    return read_interactions(table, dict(zip(columns, columns)), several_items=True)


def _has_header(pairs: Path) -> bool:
    """Return True if the first line names the columns, False if it is an interaction.

    Raises InputError if it is neither.
    """
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
    """Yield (item id, title) of every row; a title may hold commas without quotes. A header comes as one more item."""
    return ((row[0], ",".join(row[1:])) for row in _rows(file) if row)


def _rows(file: Path) -> Iterator[list[str]]:
    """Yield the rows of a CSV file. A line that is not valid CSV, as `7,"Up" again`, is split at its first comma."""
    lines = _lines(file)
    while True:
        lines, again = tee(lines)
        try:
            row = next(csv.reader(lines, strict=True), None)
        except csv.Error:  # maybe some lines later, if a quote was not closed
            row = next(again).split(",", 1)
            lines = again
        if row is None:
            return
        yield row


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without a byte order mark. Raises InputError, with the line, for other bytes."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file} line {number}: not UTF-8; save the file as UTF-8") from None
