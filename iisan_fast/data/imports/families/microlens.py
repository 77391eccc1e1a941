"""Imports of MicroLens in its published form: pairs, English titles and a folder of covers."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Set
from itertools import islice, tee
from pathlib import Path

from ....errors import InputError
from ....files import refuse_irregular, whole_folder
from ..bad_rows import BadRows
from ..options import Imported, ImportOptions
from ..rows.interactions import count_rows, read_interactions
from ..rows.titles import Titles, titles_of
from ..table import InteractionSource
from ..text.delimited import DelimitedText
from ..writing.dataset import write_dataset
from .sources import ARCHIVES, find

LOGGER = logging.getLogger(__name__)
COVERS = ("*_covers", "covers", "*covers*.lmdb", "*image*.lmdb")
PAIR_COLUMNS = ("user", "item", "timestamp")
USER_NAMES = re.compile(r"users?|(user|u)[ _-]?ids?", re.IGNORECASE)  # in a header of *_pairs.tsv
ITEM_NAMES = re.compile(
    r"(item|video)s?|(item|video|i)[ _-]?(ids?|lists?|seqs?|sequences?)|histor(y|ies)|sequences?", re.IGNORECASE
)


def import_microlens(source: Path, destination: Path, options: ImportOptions = ImportOptions()) -> Imported:
    """Make a dataset from a folder that holds one MicroLens.

    Interactions come from `*_pairs.csv`, which has timestamps, or from `*_pairs.tsv` if that is absent. Titles come
    from `*_title_en.csv` or `*_titles.csv`, covers from `*_covers`, `covers` or an LMDB of covers; both may be absent.
    Raises InputError for bad input.
    """
    with whole_folder(destination) as folder:
        pairs = find(source, "*_pairs.csv", "*_pairs.tsv")
        if pairs is None:
            raise InputError(f"{source}: expected MicroLens-*_pairs.csv or MicroLens-*_pairs.tsv in it, found neither")
        bad_rows = BadRows(pairs, options.bad_rows, "line")
        pair_source = _csv_source(pairs, bad_rows) if pairs.suffix == ".csv" else _tsv_source(pairs, bad_rows)
        interactions = read_interactions([pair_source], options)
        file = find(source, "*_title_en.csv", "*_titles.csv")
        titles = titles_of(_title_rows(file, {*interactions["item"].unique()})) if file else Titles()
        imported = write_dataset(folder, interactions, titles, _covers(source), options)
        return count_rows(imported, [pair_source])


def _covers(source: Path) -> Path | None:
    """Return the covers of a folder, None if there are none; a warning names those that are still packed.

    Raises InputError if several folders or databases could be the covers.
    """
    covers = find(source, *COVERS)
    packed = sorted(path.name for path in source.glob("*cover*") if path.name.lower().endswith(ARCHIVES))
    if covers is None and packed:
        LOGGER.warning("%s: %s is not read, and the items have no covers; unpack it there", source, packed[0])
    return covers


def _csv_source(pairs: Path, bad_rows: BadRows) -> InteractionSource:
    """Return the interactions of a CSV file with or without a header."""
    table = DelimitedText(pairs, ",", columns=PAIR_COLUMNS)
    if _has_header(pairs, table.first_fields()):
        table = DelimitedText(pairs, ",")
    return InteractionSource(table, dict(zip(PAIR_COLUMNS, PAIR_COLUMNS)), bad_rows)


def _tsv_source(pairs: Path, bad_rows: BadRows) -> InteractionSource:
    """Return the interactions of lines of a user, a tab, and items with spaces between. A header is left out."""
    columns = PAIR_COLUMNS[:2]
    table = DelimitedText(pairs, separator="\t", quoted=False, columns=columns)
    if _names_columns(table.first_fields()):
        table = DelimitedText(pairs, separator="\t", quoted=False, names_of=lambda *_: list(columns))
    return InteractionSource(table, dict(zip(columns, columns)), bad_rows, item_separator=" ")


def _has_header(pairs: Path, first: list[str]) -> bool:
    """Return True if the fields of the first line name the columns, False if they are an interaction.

    Raises InputError if it is neither.
    """
    if {*PAIR_COLUMNS} <= {*first}:
        return True
    try:
        float(first[2])
    except (IndexError, ValueError):
        line = ",".join(first)[:100]
        raise InputError(f"{pairs} line 1: expected user,item,timestamp, found {line!r}") from None
    return False


def _names_columns(first: list[str]) -> bool:
    """Return True if the fields of the first line of *_pairs.tsv name its two columns."""
    names = [field.strip() for field in first]
    return len(names) == 2 and bool(USER_NAMES.fullmatch(names[0]) and ITEM_NAMES.fullmatch(names[1]))


def _title_rows(file: Path, item_ids: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield (item id, title) of every row; a title may hold commas without quotes. A header comes as one more item."""
    return ((row[0], ",".join(row[1:])) for row in _rows(file, item_ids) if row)


def _rows(file: Path, item_ids: Set[str]) -> Iterator[list[str]]:
    """Yield the rows of a CSV file. A line that is not valid CSV, as `7,"Up" again`, is split at its first comma.

    So is a line whose quote ends on a later line, if both start with one of the item ids: a quote is missing there.
    """
    lines = _lines(file)
    while True:
        lines, again = tee(lines)
        reader = csv.reader(lines, strict=True)
        try:
            row = next(reader, None)
        except csv.Error:  # maybe some lines later, if a quote was not closed
            row = None
            swallowed = True
        else:
            again, ahead = tee(again)
            swallowed = _swallows_rows(list(islice(ahead, reader.line_num)), item_ids)
        if swallowed:
            row = next(again).split(",", 1)
            lines = again
        if row is None:
            return
        yield row


def _swallows_rows(lines: list[str], item_ids: Set[str]) -> bool:
    """Return True if the first of a row's lines and another one start with an item id and a comma."""
    starts = [line.partition(",")[0] for line in lines]
    return len(starts) > 1 and starts[0] in item_ids and not item_ids.isdisjoint(starts[1:])


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without a byte order mark.

    Raises InputError if it is no regular file, and, with the line, for bytes that are not UTF-8.
    """
    refuse_irregular(file)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file} line {number}: not UTF-8; save the file as UTF-8") from None
