"""Imports of RecBole's atomic files: tab-separated columns under a header of names with types, as `user_id:token`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ....errors import InputError
from ..flat import import_tables, items_table
from ..options import RECBOLE_FIELDS, TIMESTAMP_COLUMN, TITLE_COLUMN, Imported, TableOptions
from ..table import Table
from ..text.delimited import DelimitedText
from ..text.headers import IGNORED
from .listed_histories import PART, ListedHistories
from .recbole_files import InterFiles, find_inter_files

LOGGER = logging.getLogger(__name__)
SEQUENCES = ("token_seq", "float_seq")
TYPES = ("token", "float", *SEQUENCES)
LIST_SUFFIX = "_list"  # RecBole's name for the history before an interaction, as in item_id_list
ITEM_SUFFIX = ".item"


class AtomicFile(NamedTuple):
    """An atomic file as a table whose columns are named without their types."""

    table: DelimitedText
    sequences: list[str]  # the names of the fields of sequences
    part: str | None = None  # the one of PARTS that the file holds


def import_recbole(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a .inter file, or from a folder that holds the .inter files of one dataset.

    Titles come from the .item file of the same name, if there is one. The options name fields without their types.
    Raises InputError for bad input.
    """
    inter_files = find_inter_files(source)
    user = options.user_column or RECBOLE_FIELDS[0]
    item = options.item_column or RECBOLE_FIELDS[1]
    time = options.timestamp_column or TIMESTAMP_COLUMN
    types = {user: ("token",), item: ("token", "token_seq"), time: ("float", "token", "float_seq")}
    files = [_atomic(path, types, options)._replace(part=part) for path, part in inter_files.files]
    titles, options = _titles(source, inter_files, item, options)
    if any(f"{item}{LIST_SUFFIX}" in file.table.columns for file in files):
        tables, options = _with_histories(files, user, item, time, options)
        return import_tables(tables, titles, destination, options, RECBOLE_FIELDS)
    for file in files:
        _report_sequences(file, {user, item, time})
        if item in file.sequences:
            options = replace(options, item_separator=" ")
    return import_tables([(file.table, file.part) for file in files], titles, destination, options, RECBOLE_FIELDS)


def _titles(
    source: Path, inter_files: InterFiles, item: str, options: TableOptions
) -> tuple[Table | None, TableOptions]:
    """Return the table of titles, None if there is none, and the options that name its field of titles.

    The only field whose name ends in _title, as movie_title, is the one of titles if there is no other. Raises
    InputError for a file in another format.
    """
    beside = (source if source.is_dir() else source.parent) / f"{inter_files.name}{ITEM_SUFFIX}"
    path = options.items or (beside if os.path.lexists(beside) else None)
    if path is None:
        return None, options
    if path.suffix != ITEM_SUFFIX:
        return items_table(options), options
    title_types = {options.items_id_column or item: ("token",)}
    title_types[options.title_column or TITLE_COLUMN] = ("token", "token_seq")
    table = _atomic(path, title_types, options).table
    named = [name for name in table.columns if name.endswith("_title")]
    if options.title_column is None and TITLE_COLUMN not in table.columns and len(named) == 1:
        options = replace(options, title_column=named[0])
    return table, options


def _with_histories(
    files: Sequence[AtomicFile], user: str, item: str, time: str, options: TableOptions
) -> tuple[list[tuple[Table, None]], TableOptions]:
    """Return files with lists of the items before each interaction as tables, and the options to read them with.

    user, item, time: names of fields. Raises InputError if a file has no such lists, and for ratings, which the items
    of lists do not have.
    """
    lists = {item: f"{item}{LIST_SUFFIX}", time: f"{time}{LIST_SUFFIX}"}
    first = files[0].table
    for file in files:
        _report_sequences(file, {user, item, time, *lists.values()})
        if lists[item] not in file.table.columns:
            raise InputError(f"{file.table.path}: no field {lists[item]!r}, which other files have; give it in all")
    if options.min_rating is not None:
        raise InputError(f"{first.path}: the items of {lists[item]!r} have no ratings; leave out --min-rating")
    if time in IGNORED or not all(lists[time] in file.table.columns for file in files):
        if time in first.columns:
            LOGGER.warning("%s: %s is not read, since the items of %s have no times", first.path, time, lists[item])
        del lists[time]
    histories: dict[str, list[str]] = {}
    tables = [ListedHistories(file.table, lists, histories, file.part) for file in files]
    split = any(file.part is not None for file in files)
    columns = {"timestamp_column": time if time in lists else IGNORED[0], "split_column": PART if split else IGNORED[0]}
    return [(table, None) for table in tables], replace(options, **columns)


def _atomic(path: Path, types: Mapping[str, tuple[str, ...]], options: TableOptions) -> AtomicFile:
    """Return an atomic file. types: the types that fields which are read may have. Raises InputError for another."""
    sequences: list[str] = []

    def names_of(path: Path, header: list[str]) -> list[str]:
        """Return the names of fields. Raises InputError for one without a type, or with another than `types` has."""
        fields = [_name_and_type(path, field) for field in header]
        for name, kind in fields:
            if kind not in types.get(name, TYPES):
                expected = " or ".join(f"{name}:{kind}" for kind in types[name])
                raise InputError(f"{path} line 1: field '{name}:{kind}': expected {expected}")
        sequences[:] = [name for name, kind in fields if kind in SEQUENCES]
        return [name for name, _ in fields]

    table = DelimitedText(
        path,
        options.separator,
        quoted=False,
        names_of=names_of,
        encoding=options.encoding,
        usual_separator="\t",
    )
    return AtomicFile(table, sequences)


def _name_and_type(path: Path, field: str) -> tuple[str, str]:
    """Return the name and type of a field of the header. Raises InputError if it has no type of RecBole."""
    name, _, kind = field.rpartition(":")
    if not name or kind not in TYPES:
        if not field.isprintable():
            raise InputError(f"{path}: no header of names in its first line; is it in another format?")
        example = "user_id:token, item_id:token and timestamp:float, with tabs between"
        shown = field if len(field) <= 60 else field[:60] + "…"
        raise InputError(f"{path} line 1: expected a header of fields with types, such as {example}; found {shown!r}")
    return name, kind


def _report_sequences(file: AtomicFile, used: set[str]) -> None:
    """Warn of fields of sequences that are not read. used: the names of fields that are read."""
    unread = [name for name in file.sequences if name not in used]
    if unread:
        LOGGER.warning("%s: fields of sequences that are not read: %s", file.table.path, ", ".join(unread))
