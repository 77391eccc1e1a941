"""Read JSON lines, an object a line: blocks of lines by polars where all lines fit, line by line elsewhere."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ....errors import InputError
from ....files import refuse_irregular
from ..bad_rows import BadRows
from ..polars_module import pl
from ..reading_ahead import read_ahead
from ..text.delimited_form import is_utf8
from ..text.headers import find_columns
from .json_schemas import JsonSchema, schema_of
from .json_values import ObjectRows, Parser, UnfitLine, object_of, parse_json, parse_python, paths_in
from .line_blocks import LineBlock, line_blocks

LOGGER = logging.getLogger(__name__)
LOOKED_AT = 1000  # lines whose keys are the columns
EXAMPLE = '{"user": "u1", "item": "i1", "timestamp": 1}'


class JsonLinesTable:
    """A text file of an object a line, which gzip may have compressed.

    The columns are the keys of the first lines. A value within an object has the keys on its way with points between,
    as in user.id. A key that a line lacks is null there.
    """

    unit = "line"
    names_may_be_data = False

    def __init__(self, path: Path) -> None:
        """Look at the first lines. Raises InputError if there is no such file, and if they hold no object."""
        refuse_irregular(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self._parse: Parser = parse_json
        self._paths: dict[str, tuple[str, ...]] = {}
        self._first = self._first_objects()
        for value in self._first:
            for keys in paths_in(value):
                self._paths.setdefault(".".join(keys), keys)
        self._paths |= {keys[0]: keys for keys in self._paths.values() if len(keys) == 1}
        self.columns = list(self._paths)

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}), and each row's line as `place`.

        Lines that hold no object, or a value that fits no column, are added to `bad_rows`. is_row: not used. Raises
        InputError as `bad_rows` says, and if the file cannot be read.
        """
        find_columns(self.path, self.columns, columns, self.names_may_be_data)
        paths = {name: self._paths[column] for name, column in columns.items()}
        return read_ahead(self._batches(paths, bad_rows))

    def _batches(self, paths: Mapping[str, tuple[str, ...]], bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        """Yield the batches of `batches`. paths: {new name of a column: keys of its values}."""
        rows = ObjectRows(paths, bad_rows)
        schema = schema_of(paths, self._first) if self._parse is parse_json else None
        for block in line_blocks(self.path):
            frame = None if schema is None else _read(block, schema)
            if frame is None:
                objects = self._add_lines(block, rows)
                schema = schema_of(paths, objects) if self._parse is parse_json else None
                frame = rows.frame()
            if frame.height:
                yield frame

    def _first_objects(self) -> list[dict]:
        """Return the objects of the first lines, and find out how they are written. Raises InputError for none."""
        block = next(line_blocks(self.path), LineBlock(b"", 1, 0))
        lines = [line for line in block.content.split(b"\n", LOOKED_AT)[:LOOKED_AT] if line.strip()]
        if not lines:
            raise InputError(f"{self.path}: empty; expected an object a line, such as {EXAMPLE}")
        problem = ""
        for parse in (parse_json, parse_python):
            objects = []
            for line in lines:
                try:
                    objects.append(object_of(line, parse))
                except UnfitLine as unfit:
                    problem = problem or str(unfit)
            if objects:
                self._parse = parse
                if parse is parse_python:
                    LOGGER.warning(
                        "%s: dicts of Python, not JSON; they are read line by line, which is slow", self.path
                    )
                return objects
        raise InputError(f"{self.path} line 1: {problem}{_advice(lines[0])}")

    def _add_lines(self, block: LineBlock, rows: ObjectRows) -> list[dict]:
        """Add the objects of a block's lines to the rows, and return the first of them. Blank lines are no rows.

        Raises InputError as `rows.bad_rows` says.
        """
        objects: list[dict] = []
        for number, line in enumerate(block.content.split(b"\n")[:-1], start=block.first):
            if not line.strip():
                continue
            try:
                value = object_of(line, self._parse)
            except UnfitLine as unfit:
                rows.bad_rows.add(unfit.kind, [number], str(unfit))
                continue
            rows.add(number, value)
            if len(objects) < LOOKED_AT:
                objects.append(value)
        return objects


def _advice(line: bytes) -> str:
    """Return what to do about a file whose lines are no objects, from its first line."""
    if not is_utf8(line):
        return ""  # the problem says it
    if line.rstrip().endswith(b"},"):
        return "; remove the comma at the end of each line"
    return "; write an object a line, as `jq -c .` does"


def _read(block: LineBlock, schema: JsonSchema) -> pl.DataFrame | None:
    """Return the columns of a block of lines, and each row's line as `place`; None if a line may not fit."""
    if any(pattern.search(block.content) for pattern in schema.unfit):
        return None
    try:
        frame = pl.read_ndjson(io.BytesIO(block.content), schema=schema.types)
    except pl.exceptions.PolarsError:
        return None
    if frame.height != block.count:  # polars leaves out blank lines
        return None
    frame = frame.select(schema.columns)
    if schema.floats and not schema.are_exact(frame):
        return None
    return frame.with_columns(pl.int_range(block.first, block.first + block.count, dtype=pl.Int64).alias("place"))
