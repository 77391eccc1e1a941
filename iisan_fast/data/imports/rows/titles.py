"""Read the titles of items from tables."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest

from ....errors import first_few
from ..bad_rows import BadRows
from ..options import TITLE_COLUMN
from ..polars_module import pl
from ..table import Table
from ..text.headers import find_columns
from .row_checks import refuse_value

FIRST_IDS = 3  # of each batch of titles, for messages


@dataclass
class Titles:
    """The titles of items, and what there is to say about them."""

    of_item: dict[str, str] = field(default_factory=dict)  # item id: title
    # Item id: the first title, which is taken, and the second one.
    ambiguous: dict[str, tuple[str, str]] = field(default_factory=dict)
    problem: str = ""  # why there are none, for the warning
    other_ids: bool = False  # there are none, since the table has other item ids


def read_titles(
    table: Table, item_column: str, title_column: str | None, item_ids: Collection[str], bad_rows: BadRows
) -> Titles:
    """Return the titles of a table, as `titles_of` does. Rows without an item id are added to `bad_rows`.

    title_column: None for TITLE_COLUMN, which may then be missing. item_ids: the ids in the interactions; only their
    titles are returned. Raises InputError as `bad_rows` says, for a missing column, and if the header is data.
    """
    columns = {"item": item_column, "title": title_column or TITLE_COLUMN}
    if title_column is None and TITLE_COLUMN not in table.columns:
        del columns["title"]
    find_columns(table.path, table.columns, columns, table.names_may_be_data)
    if table.names_may_be_data:
        refuse_value(table.path, item_column, item_column in item_ids)
    if "title" not in columns:
        names = first_few(table.columns, len(table.columns), limit=10)
        return Titles(problem=f"{table.path} has no column {TITLE_COLUMN!r}, only {names}; name another by an option")
    batches = table.batches(columns, bad_rows, lambda fields: fields["item"].decode(errors="replace") in item_ids)
    counts: list[int] = []
    first_ids: list[str] = []
    titles = titles_of(_titled(batches, bad_rows, counts, first_ids), item_ids)
    bad_rows.finish(sum(counts))
    if first_ids and not titles.of_item and not any(item_id in item_ids for item_id in first_ids):
        expected, first = (", ".join(ids) for ids in (nsmallest(FIRST_IDS, item_ids), first_ids[:FIRST_IDS]))
        problem = f"{table.path}: none of its ids is an item's: expected ids such as {expected}, found {first}"
        return Titles(problem=problem, other_ids=True)
    return titles


def titles_of(rows: Iterable[tuple[str, str | None]], item_ids: Container[str] | None = None) -> Titles:
    """Return the titles in rows of item id and title; runs of whitespace become one space.

    item_ids: the items to read; None for all. An item with several titles keeps the first.
    """
    titles = Titles()
    for item_id, text in rows:
        if item_ids is not None and item_id not in item_ids:
            continue
        title = " ".join((text or "").replace("\0", " ").split())
        if not title:
            continue
        first = titles.of_item.setdefault(item_id, title)
        if first != title:
            titles.ambiguous.setdefault(item_id, (first, title))
    return titles


def describe_ambiguous(titles: Titles, item_ids: Sequence[str]) -> str:
    """Return how many items have several titles, and the titles of the first. item_ids: those that have."""
    first, second = titles.ambiguous[item_ids[0]]
    return (
        f"items with several titles: {len(item_ids):,}, of which the first title is taken; "
        f"item {item_ids[0]!r} has {first!r} and {second!r}"
    )


def _titled(
    batches: Iterator[pl.DataFrame], bad_rows: BadRows, counts: list[int], first_ids: list[str]
) -> Iterator[tuple[str, str | None]]:
    """Yield item and title of the rows with an item id, and count them; the others are added to `bad_rows`.

    first_ids: takes some ids of each batch.
    """
    for batch in batches:
        empty = (batch["item"].is_null() | (batch["item"] == "")).fill_null(True)
        if empty.any():
            bad_rows.add("empty item id", batch["place"].filter(empty), "expected an item id, found nothing")
        titled = batch.filter(~empty) if empty.any() else batch
        counts.append(titled.height)
        first_ids.extend(titled["item"].head(FIRST_IDS))
        title = pl.col("title")
        if titled.schema["title"] == pl.List:
            title = title.cast(pl.List(pl.String)).list.drop_nulls().list.join(" ")
        yield from titled.select("item", title.cast(pl.String)).iter_rows()
