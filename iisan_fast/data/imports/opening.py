"""Open a file or a folder of files as a table: delimited text, JSON lines or Parquet, by content and suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from .delimited import DelimitedText
from .parquet import ParquetTable
from .table import Table

PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class TextForm:
    """How delimited text is written; None is found out by looking at the file."""

    separator: str | None = None
    encoding: str | None = None
    columns: Sequence[str] | None = None  # names of the columns of a file without a header, in order


def open_table(path: Path, form: TextForm = TextForm()) -> Table:
    """Return the table of a file, Parquet or CSV by its suffix.

    Raises InputError if it cannot be opened, and for names of columns of a Parquet file, which has its own.
    """
    if path.suffix not in PARQUET_SUFFIXES:
        return DelimitedText(path, columns=form.columns)
    if form.columns is not None:
        raise InputError(f"{path}: columns: a Parquet file has names of its own; leave them out")
    return ParquetTable(path)
