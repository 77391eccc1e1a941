"""Imports of MicroLens as it is published: pairs, English titles and a folder of covers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..files import whole_folder
from .dataset import write_dataset
from .frames import pl
from .options import Imported, ImportOptions
from .tables import csv_table, find, read_interactions, titles_of

COLUMNS = ("user", "item", "timestamp")


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
    form = {} if _has_header(pairs) else {"has_header": False, "schema": dict.fromkeys(COLUMNS, pl.String)}
    return read_interactions(csv_table(pairs, **form), dict(zip(COLUMNS, COLUMNS)))


def _read_tsv(pairs: Path) -> pl.DataFrame:
    columns = COLUMNS[:2]
    schema = dict.fromkeys(columns, pl.String)
    table = csv_table(pairs, has_header=False, separator="\t", quote_char=None, schema=schema)
    return read_interactions(table, dict(zip(columns, columns)), several_items=True)


def _has_header(pairs: Path) -> bool:
    """Whether the third field of the first line is not a number."""
    first = next(_rows(pairs), [])
    if len(first) < len(COLUMNS):
        raise InputError(f"{pairs} line 1: expected user,item,timestamp, found {len(first)} fields")
    try:
        float(first[2])
    except ValueError:
        return True
    return False


def _title_rows(file: Path) -> Iterator[tuple[str, str]]:
    """(item id, title) of every row, commas in unquoted titles included. A header looks like one more item's."""
    return ((row[0], ",".join(row[1:])) for row in _rows(file) if row)


def _rows(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            yield from reader
        except csv.Error as error:
            raise InputError(f"{file} line {reader.line_num}: not valid CSV ({error})") from None
        except UnicodeDecodeError:
            raise InputError(f"{file} line {reader.line_num + 1}: not UTF-8; save the file as UTF-8") from None
