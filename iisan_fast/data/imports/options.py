"""Options and results of imports, apart from the imports themselves, which need polars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError

TABLE_COLUMNS = ("user", "item")  # of CSV and Parquet files, unless named
RECBOLE_FIELDS = ("user_id", "item_id")  # of RecBole's files
MISSING_TITLES = ("id", "drop", "error")


@dataclass(frozen=True)
class ImportOptions:
    """Options of every import."""

    # Items without a title: their id stands for it, so that interactions stay as published; or they are dropped.
    missing_titles: str = "id"
    copy_covers: bool = False  # rather than a link to their folder

    def __post_init__(self) -> None:
        if self.missing_titles not in MISSING_TITLES:
            expected = ", ".join(MISSING_TITLES)
            raise InputError(f"missing_titles: expected one of {expected}, found {self.missing_titles!r}")


@dataclass(frozen=True)
class TableOptions(ImportOptions):
    """Options of imports from tables whose columns may have any name."""

    user_column: str | None = None  # None: what the format calls it, TABLE_COLUMNS or RECBOLE_FIELDS
    item_column: str | None = None  # of the interactions and of the titles
    timestamp_column: str = "timestamp"
    title_column: str = "title"
    items: Path | None = None  # a table of item ids and titles
    covers: Path | None = None  # a folder of images named by item id


@dataclass(frozen=True)
class Imported:
    """Counts of an import: what the dataset holds, and what was left out."""

    users: int
    items: int
    interactions: int
    dropped_interactions: int  # those with items that have no title, where such are dropped
    items_without_title: int
    items_without_cover: int | None  # None: there are no covers
