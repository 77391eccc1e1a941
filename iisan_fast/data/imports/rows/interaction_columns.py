"""Choose the columns of a table of interactions: those an option names, or those with the usual names."""

from __future__ import annotations

import logging
import re

from ....errors import InputError, first_few
from ..bad_rows import BadRows
from ..options import RECBOLE_FIELDS, SPLIT_COLUMN, TIMESTAMP_COLUMN, TableOptions
from ..table import InteractionSource, Table
from ..text.headers import IGNORED, find_columns

LOGGER = logging.getLogger(__name__)
RATING_COLUMNS = ("rating", "overall", "stars", "score")
TIME_WORDS = {"time", "timestamp", "timestamps", "ts", "date", "dates", "datetime", "dat", "unixtime", "epoch"}
TIME_ENDINGS = ("time", "timestamp", "date", "datetime")
NO_POINTS = ("runtime", "lifetime", "playtime", "overtime", "candidate", "update")  # end as times do
NO_INTERACTIONS = {  # words in the names of durations, and of dates of users and items
    *("watch", "watching", "play", "playing", "dwell", "read", "reading", "view", "viewing", "listen", "listening"),
    *("spent", "stay", "duration", "elapsed", "birth", "release"),
}
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def interaction_source(
    table: Table,
    options: TableOptions,
    names: tuple[str, str],
    part: str | None = None,
    item_separator: str | None = None,
    timestamp_column: str = TIMESTAMP_COLUMN,
) -> InteractionSource:
    """Return the source of interactions that a table is under the options.

    names, timestamp_column: of the columns of users, items and times if the options name none. part: of all rows.
    Raises InputError for a missing column, and for one with two meanings.
    """
    columns = {"user": options.user_column or names[0], "item": options.item_column or names[1]}
    find_columns(table.path, table.columns, columns, table.names_may_be_data)
    word = "field" if names == RECBOLE_FIELDS else "column"
    time = _timestamp_column(table, options.timestamp_column, timestamp_column, word)
    if time is not None:
        columns["timestamp"] = time
    if options.min_rating is not None:
        columns["rating"] = _rating_column(table, options.rating_column, word)
    split = _named_or_default(table, options.split_column, SPLIT_COLUMN)
    if split is not None and part is None:
        columns["part"] = split
    if len({*columns.values()}) < len(columns):
        meanings = ", ".join(f"{name}: {column}" for name, column in columns.items())
        raise InputError(f"{table.path}: one column has two meanings ({meanings}); name a column for each")
    return InteractionSource(
        table,
        columns,
        BadRows(table.path, options.bad_rows, table.unit),
        part=part,
        item_separator=options.item_separator or item_separator,
        timestamp_format=options.timestamp_format,
    )


def _named_or_default(table: Table, named: str | None, default: str) -> str | None:
    """Return a column that an option names, None if it names none; without the option the default, if it is there."""
    if named is None:
        return default if default in table.columns else None
    return None if named in IGNORED else named


def _timestamp_column(table: Table, named: str | None, default: str, word: str) -> str | None:
    """Return the column of times; None if the order of the rows counts, of which a warning tells if nobody chose it.

    named: by an option; "-" for no times. word: of the option, "column" or "field". Raises InputError if the default is
    missing and another column looks like times.
    """
    column = _named_or_default(table, named, default)
    if column is not None or named is not None:
        return column
    option = f"--timestamp-{word}"
    likely = [name for name in table.columns if looks_like_time(name)]
    if likely:
        names = first_few(likely, len(likely))
        raise InputError(
            f"{table.path}: no column {default!r}, but {names} may hold times; name it with {option} {likely[0]}, or "
            f"choose the order of the file with {option} -"
        )
    LOGGER.warning("%s: no column of times, so that the order of its rows counts (%s names one)", table.path, option)
    return None


def _rating_column(table: Table, named: str | None, word: str) -> str:
    """Return the column of ratings. Raises InputError if none is named and none has a usual name."""
    if named is not None:
        return named
    by_lower_case = {name.lower(): name for name in reversed(table.columns)}
    for name in RATING_COLUMNS:
        if name in by_lower_case:
            return by_lower_case[name]
    names = first_few(table.columns, len(table.columns), limit=10)
    raise InputError(f"{table.path}: no column of ratings, only {names}; name it with --rating-{word}")


def looks_like_time(name: str) -> bool:
    """Return True if a column's name says that it holds points in time, as unixReviewTime or t_dat do."""
    words = [word.lower() for word in WORDS.findall(name)]
    if not words or NO_INTERACTIONS.intersection(words):
        return False
    return any(word in TIME_WORDS or (word.endswith(TIME_ENDINGS) and word not in NO_POINTS) for word in words)
