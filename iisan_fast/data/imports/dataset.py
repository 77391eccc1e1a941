"""Write interactions, titles and covers as a dataset folder: items.tsv, users.tsv, times.tsv and images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from ...errors import InputError, first_few
from ...progress import progress_bar
from .covers import write_covers
from .options import Imported, ImportOptions
from .polars_module import pl

LOGGER = logging.getLogger(__name__)
WRITTEN_AT_ONCE = 1_000_000  # interactions written at a time; the last user's are completed


def write_dataset(
    folder: Path, interactions: pl.DataFrame, titles: Mapping[str, str], covers: Path | None, options: ImportOptions
) -> Imported:
    """Fill an empty folder from the results of `read_interactions` and `read_titles`.

    Users and items come in order of first appearance; an item without interactions is left out. A user's interactions
    are sorted by timestamp; equal timestamps, or all without timestamps, keep their order. Repeated interactions stay.
    If there are timestamps, times.tsv holds them as users.tsv holds the items. Raises InputError for items without a
    title as the options say, and if no item is left.
    """
    item_ids = interactions["item"].unique(maintain_order=True)
    titled = pl.Series([item_id in titles for item_id in item_ids], dtype=pl.Boolean)
    untitled = item_ids.filter(~titled)
    titled_interactions = interactions
    if len(untitled):
        _report_untitled(untitled, len(item_ids), options.missing_titles)
        if options.missing_titles == "drop":
            titled_interactions = interactions.filter(titled.gather(interactions["item"].to_physical()))
            item_ids = item_ids.filter(titled)
    if not len(item_ids):
        raise InputError("nothing is left: no item has a title; choose missing_titles: id, or the file of titles")
    with (folder / "items.tsv").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{item_id}\t{titles.get(item_id, item_id)}\n" for item_id in item_ids)
    without_cover = None if covers is None else write_covers(folder, covers, item_ids, options.copy_covers)
    return Imported(
        users=_write_histories(folder, titled_interactions),
        items=len(item_ids),
        interactions=len(titled_interactions),
        dropped_interactions=len(interactions) - len(titled_interactions),
        items_without_title=len(untitled),
        items_without_cover=without_cover,
    )


def _report_untitled(untitled: pl.Series, total: int, policy: str) -> None:
    """Warn of items without a title, or raise InputError if the policy is "error". total: number of all items."""
    message = f"no title for {len(untitled):,} of {total:,} items ({first_few(untitled, len(untitled))})"
    if policy == "error":
        raise InputError(f"{message}; choose missing_titles: id or drop")
    LOGGER.warning("%s: %s", message, "they are dropped" if policy == "drop" else "their ids stand for it")


def _write_histories(folder: Path, interactions: pl.DataFrame) -> int:
    """Write users.tsv and, with timestamps, times.tsv; return the number of users."""
    files = {"item": folder / "users.tsv"}
    order = [pl.col("user").to_physical()]
    if "timestamp" in interactions.columns:
        files["timestamp"] = folder / "times.tsv"
        order.append(pl.col("timestamp"))
    users = 0
    with progress_bar("writing", len(interactions), "interactions") as advance:
        for part in _whole_users(interactions.sort(order, maintain_order=True)):
            joined = (pl.col(column).cast(pl.String).str.join(" ") for column in files)
            lines = part.group_by("user", maintain_order=True).agg(joined)
            for column, path in files.items():
                with path.open("ab") as file:
                    lines.select("user", column).write_csv(
                        file, include_header=False, separator="\t", quote_style="never"
                    )
            users += len(lines)
            advance(len(part))
    return users


def _whole_users(ordered: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Yield interactions, which are ordered by user, in parts of about WRITTEN_AT_ONCE, whole users each."""
    users = ordered["user"].to_physical().to_numpy()
    ends = np.append(np.flatnonzero(users[1:] != users[:-1]) + 1, len(users))
    cuts = ends[np.searchsorted(ends, np.arange(WRITTEN_AT_ONCE, len(users), WRITTEN_AT_ONCE))]
    for start, end in pairwise(np.unique([0, *cuts, len(users)])):
        yield ordered[start:end]
