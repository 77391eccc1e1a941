"""Read the histories of users from a file whose suffix says its format: TSV, CSV, Parquet or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...data import read_json_lines, read_table, read_table_file, text_id
from ...errors import InputError
from ..growing.catalogue import Catalogue
from .history_frames import EXPECTED, rows_of_frame, split_history
from .history_numbers import UserRow, number_histories
from .user_histories import UserHistories

SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl")


def read_histories(path: Path, catalogue: Catalogue, unknown: str) -> UserHistories:
    """Return the histories of a file in the numbers of a catalogue.

    path: .tsv has lines as users.tsv of a dataset, without a header: a user id, a tab, and item ids joined by spaces,
    or nothing. .csv and .parquet have the columns user_id and history, a list of ids or ids joined by spaces, or
    user_id and item_id with a row for each interaction. .jsonl has objects with user_id and history. A null is an empty
    history. unknown: as `number_histories` takes it.

    Raises InputError, with file and line or user, for a file that cannot be read or holds no user, for another form,
    for a user that stands twice, and as `number_histories` does.
    """
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        rows = _rows_of_lines(path)
    elif suffix == ".jsonl":
        rows = _rows_of_objects(path)
    elif suffix in SUFFIXES:
        rows = rows_of_frame(read_table_file(path, "users"), str(path))
    else:
        raise InputError(
            f"{path}: expected a file of users named *{', *'.join(SUFFIXES)}, found {path.suffix or 'no suffix'}"
        )
    histories = number_histories(rows, catalogue, str(path), unknown)
    if not histories.user_ids:
        raise InputError(f"{path}: holds no users; expected one or more")
    return histories


def _rows_of_lines(path: Path) -> Iterator[UserRow]:
    """Yield the users of a .tsv file. Raises InputError, with file and line."""
    for line, (user_id, history) in read_table(path, 2, may_end_blank=True):
        where = f"{path} line {line}"
        if line == 1 and user_id == "user_id":
            raise InputError(f"{where}: expected a user id and item ids, found a header; remove the line")
        yield UserRow(user_id, split_history(history, where), where)


def _rows_of_objects(path: Path) -> Iterator[UserRow]:
    """Yield the users of a .jsonl file. Raises InputError, with file and line."""
    for line, record in read_json_lines(path):
        where = f"{path} line {line}"
        for name in ("user_id", "history"):
            if name not in record:
                raise InputError(f"{where}: expected the fields user_id and history, found no {name}")
        history = record["history"]
        if history is None:
            item_ids = []
        elif isinstance(history, str):
            item_ids = split_history(history, where)
        elif isinstance(history, list):
            item_ids = [text_id(item_id, f"{where}: history") for item_id in history]
        else:
            raise InputError(f"{where}: history: expected {EXPECTED}, found {history!r}")
        yield UserRow(text_id(record["user_id"], f"{where}: user_id"), item_ids, where)
