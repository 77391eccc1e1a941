"""Read interactions from tables, one after the other, into one frame."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ...errors import InputError
from .headers import find_columns
from .polars_module import pl
from .row_checks import fitting_rows, refuse_value
from .table import InteractionSource
from .times import whole_numbers

NUMBER = re.compile(rb"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
IDS = ("user", "item")


def read_interactions(sources: Sequence[InteractionSource]) -> pl.DataFrame:
    """Return the interactions of all sources, in their order: 16 bytes an interaction, and the text of each id once.

    The columns are user and item, Categorical, with codes in order of first appearance, and timestamp, int64, if the
    sources have one. Rows without an id, with an unfit one, or without a whole number as timestamp are added to the
    source's `bad_rows`.

    Raises InputError as `bad_rows` says, if no row of a source is left, if a header is data, and if only some of the
    sources have timestamps.
    """
    kinds = {name: pl.Categorical(pl.Categories.random()) for name in IDS}
    timed = [source.table.path for source in sources if "timestamp" in source.columns]
    if timed and len(timed) < len(sources):
        untimed = next(source.table.path for source in sources if "timestamp" not in source.columns)
        raise InputError(f"{untimed}: has no timestamps, and {timed[0]} has; give both or neither")
    parts = [part for source in sources for part in _read_source(source, kinds)]
    return pl.concat(parts)


def _read_source(source: InteractionSource, kinds: Mapping[str, pl.Categorical]) -> list[pl.DataFrame]:
    """Return the interactions of one source in parts. Raises InputError as `read_interactions` does."""
    table = source.table
    columns = source.columns
    bad_rows = source.bad_rows
    find_columns(table.path, table.columns, columns, table.names_may_be_data)
    timed = "timestamp" in columns
    parts: list[pl.DataFrame] = []
    good_rows = 0
    for batch in table.batches(columns, bad_rows, _is_interaction if timed else None):
        rows = batch
        if source.item_separator is not None:
            rows = rows.with_columns(_split(pl.col("item"), source.item_separator)).explode("item")
        if timed:
            rows = rows.with_columns(whole_numbers(rows["timestamp"]).alias("whole"))
        fit = fitting_rows(rows, bad_rows)
        if table.names_may_be_data:
            for name in IDS:
                refuse_value(table.path, columns[name], (fit[name] == columns[name]).any())
        good_rows += fit["place"].n_unique() if source.item_separator is not None else fit.height
        # One column follows the other, since codes of columns in parallel would come in random order.
        ids = [fit[name].cast(kind) for name, kind in kinds.items()]
        parts.append(pl.DataFrame([*ids, fit["whole"].alias("timestamp")] if timed else ids))
    bad_rows.finish(good_rows)
    if not good_rows:
        raise InputError(f"{table.path}: holds no interactions")
    return parts


def _split(items: pl.Expr, separator: str) -> pl.Expr:
    """Return the lists of ids of texts with one or more separators between ids."""
    runs = f"(?:{re.escape(separator)})+"
    return items.str.strip_chars(separator).str.replace_all(runs, separator).str.split(separator)


def _is_interaction(fields: Mapping[str, bytes]) -> bool:
    """Return True if fields, as they stand in a text, are an interaction."""
    ids = (fields["user"], fields["item"])
    return bool(NUMBER.fullmatch(fields["timestamp"])) and all(len(text.split()) == 1 for text in ids)
