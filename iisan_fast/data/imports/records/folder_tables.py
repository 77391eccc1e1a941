"""Read all files of a folder as one table, as Spark and other programs write them in parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from ..bad_rows import BadRows
from ..polars_module import pl
from ..table import Table
from ..text.headers import find_columns

HIDDEN = (".", "_")  # what names of files start with that hold no rows, as _SUCCESS and .part-0.crc
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # Hive's name of a missing value in the name of a folder


class FolderTable:
    """The tables of a folder's files, one after the other.

    Folders in it may be named key=value, as Hive names them; the key is a column of text then.
    """

    def __init__(self, path: Path, files: Sequence[Path], open_file: Callable[[Path], Table]) -> None:
        """Open the first file. Raises InputError as `open_file` does."""
        self.path = path
        self._files = files
        self._open_file = open_file
        first = open_file(files[0])
        self.unit = first.unit
        self.names_may_be_data = first.names_may_be_data
        self.columns = list(dict.fromkeys([*first.columns, *self._keys_of(files[0])]))

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the files}), and each row's `place` in its file.

        `bad_rows.file` is the file of the rows until the next ones are read. is_row: as the files' tables take it.
        Raises InputError as these do, and if a file lacks a column.
        """
        for file in self._files:
            bad_rows.file = file
            table = self._open_file(file)
            keys = self._keys_of(file)
            find_columns(file, [*table.columns, *keys], columns, table.names_may_be_data)
            read = {name: column for name, column in columns.items() if column not in keys}
            for batch in table.batches(read, bad_rows, is_row):
                values = (
                    pl.lit(keys[column], pl.String).alias(name) for name, column in columns.items() if column in keys
                )
                yield batch.with_columns(values)
        bad_rows.file = bad_rows.path

    def _keys_of(self, file: Path) -> dict[str, str | None]:
        """Return the keys and values in the names of the folders above a file."""
        pairs = [name.split("=", 1) for name in file.relative_to(self.path).parts[:-1] if "=" in name]
        return {key: None if value == NO_VALUE else unquote(value) for key, value in pairs}


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and in folders within it, in natural order: part-2 before part-10.

    Hidden files, and those whose names start with _, are left out.
    """
    files = [
        file
        for file in folder.rglob("*")
        if not file.is_dir() and not any(part.startswith(HIDDEN) for part in file.relative_to(folder).parts)
    ]
    return sorted(files, key=lambda file: _natural(str(file.relative_to(folder))))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return the key by which names with numbers are sorted as people do."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in re.split("([0-9]+)", name)]
