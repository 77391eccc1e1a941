"""Define what an import reads: tables of rows under named columns, and where they stand for interactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .bad_rows import BadRows
from .polars_module import pl

PARTS = ("training", "validation", "test")  # of a split that the source gives; a part's number is its place here


class Table(Protocol):
    """A file of rows under named columns."""

    path: Path
    columns: list[str]
    unit: str  # "line" or "row": what the places of rows count
    names_may_be_data: bool  # the names of columns are the first line of a text, which may have no header

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}) and each row's `place`."""


@dataclass(frozen=True)
class InteractionSource:
    """A table of interactions, with the columns to read."""

    table: Table
    columns: Mapping[str, str]  # {"user", "item" and, if there are, "timestamp", "rating", "part": name in the table}
    bad_rows: BadRows
    part: str | None = None  # the one of PARTS to which all rows belong; None if a column says it, or nothing does
    item_separator: str | None = None  # between the ids of an item field of text; None for one id a field
    timestamp_format: str | None = None  # of strptime, for times of text; None: numbers or ISO 8601
