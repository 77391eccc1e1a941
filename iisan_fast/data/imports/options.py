"""Options and results of imports. This module works without polars, which the imports need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError, check_choice
from .bad_rows import BAD_ROWS, BadKind

TABLE_COLUMNS = ("user", "item")  # default columns of CSV and Parquet files
RECBOLE_FIELDS = ("user_id", "item_id")  # default columns of RecBole's files
TIMESTAMP_COLUMN = "timestamp"  # default columns of every format
TITLE_COLUMN = "title"
SPLIT_COLUMN = "split"
MISSING_TITLES = ("id", "drop", "error")
DUPLICATES = ("keep", "first", "last")


@dataclass(frozen=True)
class ImportOptions:
    """Options of every import."""

    # Items without a title: "id" takes the item id as title, "drop" drops the item, "error" refuses the import.
    missing_titles: str = "id"
    copy_covers: bool = False  # rather than a link to their folder
    # Rows that do not fit: "error" refuses the import, "skip" leaves them out and counts them.
    bad_rows: str = field(default="error", kw_only=True)
    # Interactions of one user with one item: "keep" keeps all, "first" and "last" keep one of them, by time.
    duplicates: str = field(default="keep", kw_only=True)
    min_rating: float | None = field(default=None, kw_only=True)  # interactions with a lower rating are left out
    # Users and items with fewer interactions are left out, again until all that are left have as many.
    user_core: int = field(default=1, kw_only=True)
    item_core: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        """Raise InputError for an unknown choice, a rating that is no number, and a core of less than one."""
        check_choice("missing_titles", self.missing_titles, MISSING_TITLES)
        check_choice("bad_rows", self.bad_rows, BAD_ROWS)
        check_choice("duplicates", self.duplicates, DUPLICATES)
        if self.min_rating is not None and not math.isfinite(self.min_rating):
            raise InputError(f"min_rating: expected a number, found {self.min_rating}")
        for name in ("user_core", "item_core"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a whole number from 1 up, found {getattr(self, name)}")


@dataclass(frozen=True)
class TableOptions(ImportOptions):
    """Options of imports from tables whose columns may have any name."""

    user_column: str | None = None  # None: the default column of the format
    item_column: str | None = None  # of the interactions and, without items_id_column, of the titles
    timestamp_column: str | None = None  # None: TIMESTAMP_COLUMN, if the file has it; -: none
    title_column: str | None = None  # None: TITLE_COLUMN, if the table of titles has it
    items: Path | None = None  # a table of item ids and titles
    covers: Path | None = None  # a folder of images named by item id
    columns: Sequence[str] | None = None  # names of the columns of a CSV file without a header, in order
    items_columns: Sequence[str] | None = None  # the same of the table of titles
    separator: str | None = None  # between fields of text; None: found by looking
    encoding: str | None = None  # of text; None: UTF-8
    timestamp_format: str | None = None  # of strptime; None: whole numbers, fractions of seconds, or ISO 8601
    item_separator: str | None = None  # between the ids of an item field of text that holds several
    rating_column: str | None = None  # read if there is a least rating; None: the first usual name, as rating or stars
    split_column: str | None = None  # says the part of each interaction; None: split, if there is one; -: none
    validation: Path | None = None  # files of the parts of a given split, beside the source, which is training
    test: Path | None = None
    items_id_column: str | None = None  # of the item ids in the table of titles; None: as in the interactions

    def __post_init__(self) -> None:
        """Raise InputError for an unknown choice, and for an option without the one that it belongs to."""
        super().__post_init__()
        if self.rating_column is not None and self.min_rating is None:
            raise InputError("rating_column: needs the least rating; give it by min_rating, too")
        if self.split_column not in (None, "-") and (self.validation, self.test) != (None, None):
            raise InputError("split_column: the files of validation and test say the parts; give one or the other")
        if self.items_id_column is not None and self.items is None:
            raise InputError("items_id_column: needs a table of titles; name it by items, too")
        if self.items_columns is not None and self.items is None:
            raise InputError("items_columns: needs a table of titles; name it by items, too")


@dataclass(frozen=True)
class Imported:
    """Counts of an import: the dataset's users, items and interactions, and how many were left out."""

    users: int
    items: int
    interactions: int
    dropped_interactions: int  # with items that were dropped for lack of a title
    items_without_title: int
    items_without_cover: int | None  # None if there are no covers
    rows: int = 0  # of the files of interactions, headers not counted, those left out included
    low_rated_interactions: int = 0  # left out for their rating, then as duplicates, then by the cores
    duplicate_interactions: int = 0
    core_interactions: int = 0
    items_with_two_titles: int = 0  # the first one is taken
    bad_rows: dict[str, BadKind] = field(default_factory=dict)  # rows left out because they do not fit, by kind
    bad_title_rows: dict[str, BadKind] = field(default_factory=dict)  # the same of the table of titles
