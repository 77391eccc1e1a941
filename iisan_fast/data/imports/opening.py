"""Open a file or a folder of files as a table: delimited text, JSON lines or Parquet, by content and suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import InputError, first_few
from ...files import refuse_irregular
from .records.folder_tables import FolderTable, files_in
from .records.json_arrays import JsonArrayTable
from .records.json_lines import JsonLinesTable
from .records.line_blocks import BYTE_ORDER_MARK
from .records.parquet import ParquetTable
from .table import Table
from .text.compression import COMPRESSED_SUFFIXES, opened, refuse_packed
from .text.delimited import DelimitedText

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET_MAGIC = b"PAR1"
TEXT, JSON, PARQUET = "delimited text", "JSON", "Parquet"
LOOKED_AT = 64 << 10  # bytes whose beginning says which format a file has


@dataclass(frozen=True)
class TextForm:
    """The form of delimited text; None is found out by looking at the file."""

    separator: str | None = None
    encoding: str | None = None
    columns: Sequence[str] | None = None  # names of the columns of a file without a header, in order
    usual_separator: str | None = None  # of a file beside this one; used if it is in the first line


def open_table(path: Path, form: TextForm = TextForm()) -> Table:
    """Return the table of a file, or one table of all files in a folder, in natural order of their names.

    Raises InputError if it cannot be opened, for files of several formats in a folder, and for names of columns of a
    file that has its own names.
    """
    if not path.is_dir():
        return _open_file(path, format_of(path), form)
    files = [file for file in files_in(path) if not _is_empty(file)]
    if not files:
        raise InputError(f"{path}: expected files of interactions or titles in it, found none")
    formats: dict[str, Path] = {}
    for file in files:
        formats.setdefault(format_of(file), file)
    if len(formats) > 1:
        shown = first_few((f"{name}: {file.name}" for name, file in formats.items()), len(formats))
        raise InputError(f"{path}: expected files of one format in it, found several ({shown}); name the files to read")
    only = next(iter(formats))
    return FolderTable(path, files, partial(_open_file, form_of_file=only, form=form))


def format_of(path: Path) -> str:
    """Return a file's format, TEXT, JSON or PARQUET. Raises InputError if it cannot be read, or is packed."""
    refuse_irregular(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with opened(path) as (file, _):
        content = file.read(LOOKED_AT)
    refuse_packed(path, content)
    if content.startswith(PARQUET_MAGIC) or path.suffix in PARQUET_SUFFIXES:
        return PARQUET
    start = content.removeprefix(BYTE_ORDER_MARK).lstrip()
    is_object = start.startswith(b"{") or (start.startswith(b"[") and start[1:].lstrip().startswith(b"{"))
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix
    return JSON if is_object or suffix in JSON_SUFFIXES else TEXT


def _open_file(path: Path, form_of_file: str, form: TextForm) -> Table:
    """Return the table of a file of a format. Raises InputError as `open_table` does."""
    if form_of_file == TEXT:
        return DelimitedText(
            path,
            separator=form.separator,
            columns=form.columns,
            encoding=form.encoding,
            usual_separator=form.usual_separator,
        )
    if form.columns is not None:
        raise InputError(f"{path}: columns: a {form_of_file} file has names of its own; leave them out")
    open_one: Callable[[Path], Table] = ParquetTable
    if form_of_file == JSON:
        open_one = JsonArrayTable if _is_array(path) else JsonLinesTable
    return open_one(path)


def _is_empty(path: Path) -> bool:
    """Return True if a file is empty, as a part without rows may be. Raises InputError if it cannot be read."""
    refuse_irregular(path)
    with opened(path) as (file, _):
        return not file.read(1)


def _is_array(path: Path) -> bool:
    """Return True if a JSON file is one array. Raises InputError if it cannot be read."""
    with opened(path) as (file, _):
        return file.read(LOOKED_AT).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
