"""Make a row an interaction of a row a user, which holds lists of items and of what belongs to each."""

from __future__ import annotations

import re

from ..bad_rows import BadRows
from ..polars_module import pl
from .listed_texts import read_lists


def one_item_a_row(rows: pl.DataFrame, separator: str | None, bad_rows: BadRows) -> pl.DataFrame:
    """Return rows with one item each; values that are no lists stand for every item of their row.

    separator: between the ids in an item field of text; None for one id. Text of times is split by it, too, if it then
    has as many pieces. Rows with an empty list, or with lists of other lengths than the items', go to `bad_rows`.
    """
    rows = read_lists(rows, bad_rows)
    if separator is not None and rows.schema["item"] == pl.String:
        rows = _split(rows, separator)
    lists = [name for name, kind in rows.schema.items() if kind.is_nested()]
    if not lists:
        return rows
    if "item" not in lists:
        rows = rows.with_columns(pl.concat_list("item"))
        lists.append("item")
    lengths = rows.select("place", *(pl.col(name).list.len().fill_null(0) for name in lists))
    empty = lengths["item"] == 0
    if empty.any():
        bad_rows.add("bad item", lengths["place"].filter(empty), "item: expected a list of ids, found nothing")
    fits = ~empty
    for name in lists:
        unequal = fits & (lengths[name] != lengths["item"])
        if unequal.any():
            first = lengths.filter(unequal).row(0, named=True)
            problem = f"{name}: expected a list as long as the items', {first['item']}, found {first[name]}"
            bad_rows.add("lists of unequal lengths", lengths["place"].filter(unequal), problem)
            fits &= ~unequal
    return rows.filter(fits).explode(lists)


def _split(rows: pl.DataFrame, separator: str) -> pl.DataFrame:
    """Return rows with lists in place of texts of items, and of times that have as many pieces."""

    def pieces(name: str) -> pl.Expr:
        """Return the pieces of a column's texts; several separators in a row are one."""
        runs = f"(?:{re.escape(separator)})+"
        trimmed = pl.col(name).str.replace(f"^{runs}", "").str.replace(f"{runs}$", "")
        return trimmed.str.replace_all(runs, separator.replace("$", "$$")).str.split(separator)

    split = rows.with_columns(pieces("item"))
    if split.schema.get("timestamp") == pl.String:
        times = pieces("timestamp")
        repeated = pl.col("timestamp").repeat_by(pl.col("item").list.len())
        split = split.with_columns(
            pl.when(times.list.len() == pl.col("item").list.len()).then(times).otherwise(repeated).alias("timestamp")
        )
    return split
