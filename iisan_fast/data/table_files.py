"""Read a table from a file whose suffix says its format: CSV, TSV, Parquet or JSON lines, with ids as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_few
from ..files import refuse_irregular
from ..recorded_json import distinct_names
from .frames import HISTORY_COLUMN, ID_COLUMNS, frame_of_records, refuse_repeated, with_text_ids

if TYPE_CHECKING:
    import polars as pl

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")
LONGEST_LINE = 16 << 20  # bytes of a line of JSON


def read_table_file(path: Path, where: str) -> pl.DataFrame:
    """Return the table of a file as a polars frame in which all ids are text, as `as_polars` returns it.

    path: .csv and .tsv have a header, and all their columns are text; a field without a character is null. .jsonl has
    an object a line. where: what the table is for, as in "users".

    Raises InputError, in one line with file and line or row: another suffix, no regular file, nothing in it, no UTF-8,
    a row with another number of fields, a header without names, an unfit id; and if polars is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        expected = f"expected a file of {where} named *{', *'.join(TABLE_SUFFIXES)}"
        raise InputError(f"{path}: {expected}, found {path.suffix or 'no suffix'}")
    refuse_irregular(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of {where}")
    if suffix == ".jsonl":
        frame = _frame_of_json_lines(path)
    elif suffix == ".parquet":
        frame = _read_parquet(path)
    else:
        frame = _read_delimited(path, None if suffix == ".csv" else "\t")
    if not frame.height:
        raise InputError(f"{path}: holds no {where}; expected a row or more")
    return frame


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number from 1, JSON object) of a file; blank lines are left out.

    Raises InputError, with file and line, for no regular file, and a line that is no JSON object or too long.
    """
    refuse_irregular(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if not line.strip():
                continue
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path} line {number}: longer than {LONGEST_LINE >> 20} MB; is it JSON lines?")
            yield number, _json_object(line, f"{path} line {number}", first=number == 1)


def _read_delimited(path: Path, separator: str | None) -> pl.DataFrame:
    """Return the table of delimited text with a header. separator: None for CSV, whose fields may be quoted.

    Raises InputError.
    """
    from .imports.bad_rows import BadRows
    from .imports.polars_module import pl
    from .imports.text.delimited import DelimitedText

    quoted = None if separator is None else False
    table = DelimitedText(path, separator, quoted, names_of=_header, has_options=False)
    columns = {f"column {number}": name for number, name in enumerate(table.columns)}
    bad_rows = BadRows(path, "error", table.unit, hint="correct it")
    batches = []
    for batch in table.batches(columns, bad_rows):
        lines = batch["place"]
        fields = batch.select(*columns).rename(columns)
        batches.append(with_text_ids(fields, lambda row, lines=lines: f"{path} line {lines[row]}"))
    return pl.concat(batches) if batches else pl.DataFrame(schema=dict.fromkeys(table.columns, pl.String))


def _header(path: Path, names: list[str]) -> list[str]:
    """Return the names of a header. Raises InputError unless they differ and one names ids."""
    refuse_repeated(names, f"{path} line 1")
    if not {*names} & {*ID_COLUMNS, HISTORY_COLUMN}:
        shown = first_few(map(repr, names), len(names), limit=5)
        raise InputError(f"{path} line 1: expected a header that names {' or '.join(ID_COLUMNS)}, found {shown}")
    return names


def _read_parquet(path: Path) -> pl.DataFrame:
    """Return the table of a Parquet file. Raises InputError if it cannot be read."""
    from .imports.polars_module import pl

    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a table ({str(error).strip().splitlines()[0]})") from None
    return with_text_ids(frame, lambda row: f"{path} row {row + 1}")


def _frame_of_json_lines(path: Path) -> pl.DataFrame:
    """Return the table of a file with a JSON object a line. Raises InputError."""
    records: list[object] = []
    lines: list[int] = []
    for number, record in read_json_lines(path):
        records.append(record)
        lines.append(number)
    return frame_of_records(records, str(path), lambda row: f"{path} line {lines[row]}")


def _json_object(line: bytes, where: str, first: bool) -> dict[str, object]:
    """Return the object of a line. `first`: a byte order mark may stand before it. Raises InputError if it is none."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (at byte {error.start + 1}); save the file as UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=distinct_names)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half a surrogate pair (\\ud800 to \\udfff); write the character itself") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object, found {_first(text)} ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object with the fields of a row, found {_first(text)}")
    return value


def _first(text: str) -> str:
    """Return the first characters of a line for a message."""
    shown = text.strip()
    return repr(shown if len(shown) <= 60 else shown[:60] + "…")
