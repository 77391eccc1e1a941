"""Read interactions from tables, one after the other, into one frame."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ....errors import InputError
from ..bad_rows import BadKind
from ..options import Imported, ImportOptions
from ..polars_module import pl
from ..table import PARTS, InteractionSource
from ..text.headers import find_columns
from .item_lists import one_item_a_row
from .parts import EXPECTED_PART, read_parts
from .row_checks import IDS, fitting_rows, refuse_value
from .times import TimeReader, at_scale

NUMBER = re.compile(rb"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
DATE = re.compile(rb"[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([Tt ][0-9:., A-Zz+-]*)?")


def read_interactions(sources: Sequence[InteractionSource], options: ImportOptions = ImportOptions()) -> pl.DataFrame:
    """Return the interactions of all sources, in their order: 16 bytes an interaction, and the text of each id once.

    The columns are user and item, Categorical, with codes in order of first appearance; timestamp, int64, if the
    sources have times; and part, uint8, the place in PARTS, if they have parts. Interactions with a lower rating than
    the options' least one are left out. Rows without an id, with an unfit one, or with another value that cannot be
    read are added to the source's `bad_rows`.

    Raises InputError as `bad_rows` says, if a source holds no row or no rating is high enough, if a header is data, and
    if only some of the sources have times, ratings or parts.
    """
    _refuse_unequal(sources, options)
    kinds = {name: pl.Categorical(pl.Categories.random()) for name in IDS}
    times = TimeReader()
    read: list[tuple[pl.DataFrame, int]] = []
    for source in sources:
        read += _read_source(source, kinds, times, options.min_rating)
    times.report_unit()
    if not any(frame.height for frame, _ in read):
        paths = ", ".join(str(source.table.path) for source in sources)
        raise InputError(f"{paths}: no interaction has a rating of {options.min_rating:g} or more; lower --min-rating")
    return pl.concat([_at_scale(frame, scale, times.scale) for frame, scale in read])


def count_rows(imported: Imported, sources: Sequence[InteractionSource]) -> Imported:
    """Return the counts of an import with the rows of its sources, which `read_interactions` has read."""
    bad_rows = [source.bad_rows for source in sources]
    several = sum(bool(bad.count) for bad in bad_rows) > 1
    kinds: dict[str, BadKind] = {}
    for bad in bad_rows:
        kinds |= {f"{bad.path.name}: {name}" if several else name: kind for name, kind in bad.kinds.items()}
    return replace(
        imported,
        rows=sum(bad.good + bad.count for bad in bad_rows),
        low_rated_interactions=sum(bad.low_rated for bad in bad_rows),
        bad_rows=kinds,
    )


def _refuse_unequal(sources: Sequence[InteractionSource], options: ImportOptions) -> None:
    """Raise InputError if some sources have times or parts and others have none, or if one lacks the ratings."""
    for name, words in (("timestamp", "timestamps"), ("part", "parts")):
        with_it = [source.table.path for source in sources if _has(source, name)]
        without = [source.table.path for source in sources if not _has(source, name)]
        if with_it and without:
            raise InputError(f"{without[0]}: has no {words}, and {with_it[0]} has; give both or neither")
    for source in sources:
        if options.min_rating is not None and not _has(source, "rating"):
            raise InputError(f"{source.table.path}: has no ratings, which --min-rating compares; leave it out")


def _has(source: InteractionSource, name: str) -> bool:
    """Return True if a source says this of its interactions."""
    return name in source.columns or (name == "part" and source.part is not None)


def _read_source(
    source: InteractionSource, kinds: Mapping[str, pl.Categorical], times: TimeReader, min_rating: float | None
) -> list[tuple[pl.DataFrame, int]]:
    """Return the interactions of one source in batches, and the scale of each one's times.

    Raises InputError as `read_interactions` does.
    """
    table = source.table
    columns = source.columns
    bad_rows = source.bad_rows
    find_columns(table.path, table.columns, columns, table.names_may_be_data)
    read: list[tuple[pl.DataFrame, int]] = []
    good_rows = 0
    for batch in table.batches(columns, bad_rows, _is_interaction if "timestamp" in columns else None):
        items = one_item_a_row(batch, source.item_separator, bad_rows)
        rows, expected = _read_values(items, source, times)
        fit = fitting_rows(rows, bad_rows, expected)
        if table.names_may_be_data:
            for name in IDS:
                refuse_value(table.path, columns[name], (fit[name] == columns[name]).any())
        good_rows += fit.height if items is batch else fit["place"].n_unique()
        if min_rating is not None:
            high = fit.filter(fit["rating read"] >= min_rating)
            bad_rows.low_rated += fit.height - high.height
            fit = high
        read.append((_compact(fit, source, kinds), times.scale))
    bad_rows.finish(good_rows)
    if not good_rows:
        raise InputError(f"{table.path}: holds no interactions")
    return read


def _read_values(
    rows: pl.DataFrame, source: InteractionSource, times: TimeReader
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return rows with what is read of times, ratings and parts beside them, and what each has to be, for messages.

    Raises InputError for a format of times that cannot be used.
    """
    expected: dict[str, str] = {}
    read: list[pl.Series] = []
    if "timestamp" in rows.columns:
        read.append(times.read(rows["timestamp"], source.timestamp_format).alias("timestamp read"))
        expected["timestamp"] = times.expected(source.timestamp_format)
    if "rating" in rows.columns:
        read.append(_ratings(rows["rating"]).alias("rating read"))
        expected["rating"] = "a number"
    if "part" in rows.columns:
        read.append(read_parts(rows["part"]).alias("part read"))
        expected["part"] = EXPECTED_PART
    return rows.with_columns(read), expected


def _ratings(column: pl.Series) -> pl.Series:
    """Return ratings as Float64, null for what is no finite number."""
    if column.dtype == pl.Float32:
        column = column.cast(pl.String)  # 4.1 as Float32 would be less than 4.1
    ratings = column.cast(pl.Float64, strict=False)
    return ratings.set(~ratings.is_finite(), None)


def _compact(rows: pl.DataFrame, source: InteractionSource, kinds: Mapping[str, pl.Categorical]) -> pl.DataFrame:
    """Return the columns of the result, each id as the code of its text."""
    # A thread for each column: one column's codes come in the order of its rows.
    with ThreadPoolExecutor(len(kinds), "import: ids") as threads:
        columns = list(threads.map(lambda name: rows[name].cast(kinds[name]), kinds))
    if "timestamp read" in rows.columns:
        columns.append(rows["timestamp read"].alias("timestamp"))
    if source.part is not None:
        columns.append(pl.repeat(PARTS.index(source.part), rows.height, dtype=pl.UInt8, eager=True).alias("part"))
    elif "part read" in rows.columns:
        columns.append(rows["part read"].alias("part"))
    return pl.DataFrame(columns)


def _at_scale(frame: pl.DataFrame, scale: int, new_scale: int) -> pl.DataFrame:
    """Return interactions whose times have a larger scale. Raises InputError if 64 bits do not hold them."""
    if scale == new_scale or not frame.height:
        return frame
    return frame.with_columns(at_scale(frame["timestamp"], scale, new_scale))


def _is_interaction(fields: Mapping[str, bytes]) -> bool:
    """Return True if fields, as they stand in a text, are an interaction."""
    ids = (fields["user"], fields["item"])
    time = fields["timestamp"]
    return bool(NUMBER.fullmatch(time) or DATE.fullmatch(time)) and all(len(text.split()) == 1 for text in ids)
