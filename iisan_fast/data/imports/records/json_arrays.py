"""Read a JSON file of one array of objects, object by object."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ....errors import InputError
from ....progress import progress_bar
from ..bad_rows import BadRows
from ..polars_module import pl
from ..text.compression import opened
from ..text.headers import find_columns
from .json_values import PARSE_ERRORS, Keys, ObjectRows, first_values, paths_in, shortened, shown_value
from .line_blocks import MAX_LINE_BYTES, MEGABYTE

BLOCK_BYTES = 1 << 20
LOOKED_AT = 1000  # objects whose keys are the columns
ROWS_AT_ONCE = 50_000
OPENING = re.compile(r"\s*\[\s*")
BETWEEN = re.compile(r"\s*,\s*")
CLOSING = re.compile(r"\s*\]")
EMPTY = re.compile(r"\s*\[\s*\]")
CONVERT = "write an object a line instead, as `jq -c '.[]'` does"


class JsonArrayTable:
    """A file that holds one array of objects. Places count the objects from 1."""

    unit = "object"
    names_may_be_data = False

    def __init__(self, path: Path) -> None:
        """Look at the first objects. Raises InputError if they cannot be read."""
        self.path = path
        self._paths: dict[str, Keys] = {}
        for value in islice(self._values(), LOOKED_AT):
            if isinstance(value, dict):
                for keys in paths_in(value):
                    self._paths.setdefault(".".join(keys), keys)
        if not self._paths:
            raise InputError(f"{path}: holds no objects")
        self.columns = list(self._paths)

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}), and each row's number from 1 as `place`.

        Values that are no objects, or that hold a value that fits no column, are added to `bad_rows`. is_row: not used.
        Raises InputError as `bad_rows` says, and if the file cannot be read.
        """
        find_columns(self.path, self.columns, columns, self.names_may_be_data)
        rows = ObjectRows({name: self._paths[column] for name, column in columns.items()}, bad_rows)
        values = enumerate(self._values(), start=1)
        while part := list(islice(values, ROWS_AT_ONCE)):
            for place, value in part:
                if isinstance(value, dict):
                    rows.add(place, value)
                else:
                    problem = f"expected a JSON object, found {shown_value(value)}"
                    bad_rows.add("no JSON object", [place], problem)
            frame = rows.frame()
            if frame.height:
                yield frame

    def _values(self) -> Iterator[Any]:
        """Yield the values of the array. Raises InputError if it is no array, or does not end."""
        decoder = json.JSONDecoder(strict=False, object_pairs_hook=first_values)
        text = ""
        number = 0
        for more in self._texts():
            text += more
            at = 0
            while mark := (BETWEEN if number else OPENING).match(text, at):
                try:
                    value, end = decoder.raw_decode(text, mark.end())
                except PARSE_ERRORS:  # perhaps it goes on in the next block
                    break
                if end == len(text):
                    break
                yield value
                number += 1
                at = end
            if (CLOSING if number else EMPTY).match(text, at):
                return
            text = text[at:]
            if len(text) > MAX_LINE_BYTES:
                break
        where = f"{self.path} object {number + 1}"
        raise InputError(f"{where}: the array cannot be read on at {shortened(text.strip())}; {CONVERT}")

    def _texts(self) -> Iterator[str]:
        """Yield the file's text in blocks. Raises InputError if it is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        size = self.path.stat().st_size
        with (
            opened(self.path) as (file, compressed),
            progress_bar(f"reading {self.path.name}", size // MEGABYTE, "MB") as advance,
        ):
            done = 0
            while content := file.read(BLOCK_BYTES):
                try:
                    yield decoder.decode(content)
                except UnicodeDecodeError:
                    raise InputError(f"{self.path}: not UTF-8; save the file as UTF-8") from None
                advance(compressed.tell() // MEGABYTE - done)
                done = compressed.tell() // MEGABYTE
