"""Options and results of imports. This module works without polars, which the imports need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError

TABLE_COLUMNS = ("user", "item")  # default columns of CSV and Parquet files
RECBOLE_FIELDS = ("user_id", "item_id")  # default columns of RecBole's files
MISSING_TITLES = ("id", "drop", "error")


@dataclass(frozen=True)
class ImportOptions:
    """Options of every import."""

    # Items without a title: "id" takes the item id as title, "drop" drops the item, "error" refuses the import.
    missing_titles: str = "id"
    copy_covers: bool = False  # rather than a link to their folder

    def __post_init__(self) -> None:
        """Raise InputError for an unknown choice."""
        if self.missing_titles not in MISSING_TITLES:
            expected = ", ".join(MISSING_TITLES)
            raise InputError(f"missing_titles: expected one of {expected}, found {self.missing_titles!r}")


@dataclass(frozen=True)
class TableOptions(ImportOptions):
    """Options of imports from tables whose columns may have any name."""

    user_column: str | None = None  # None: the default column of the format
    item_column: str | None = None  # of the interactions and of the titles
    timestamp_column: str = "timestamp"
    title_column: str = "title"
    items: Path | None = None  # a table of item ids and titles
    covers: Path | None = None  # a folder of images named by item id


@dataclass(frozen=True)
class Imported:
    """Counts of an import: the dataset's users, items and interactions, and how many were left out."""

    users: int
    items: int
    interactions: int
    dropped_interactions: int  # with items that were dropped for lack of a title
    items_without_title: int
    items_without_cover: int | None  # None if there are no covers
