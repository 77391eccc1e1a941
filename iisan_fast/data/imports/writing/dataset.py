"""Write interactions, titles and covers as a dataset folder: items.tsv, users.tsv, times.tsv and images."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from ....errors import InputError, first_few
from ..options import Imported, ImportOptions, TableOptions
from ..polars_module import pl
from ..rows.interaction_filters import k_core, without_duplicates
from ..rows.suspect_values import report_suspect_values
from ..rows.titles import Titles, describe_ambiguous
from .covers import write_covers
from .history_order import OrderedHistories, ordered_histories
from .history_writing import write_histories

LOGGER = logging.getLogger(__name__)


def write_dataset(
    folder: Path, interactions: pl.DataFrame, titles: Titles, covers: Path | None, options: ImportOptions
) -> Imported:
    """Fill an empty folder from the results of `read_interactions` and `read_titles`.

    Users and items come in order of first appearance in the source; an item without interactions is left out. A user's
    interactions are sorted as `ordered_histories` says, and those that the options leave out are counted. If there are
    times, times.tsv holds them as users.tsv holds the items. Raises InputError for items without a title as the
    options say, and if no item is left.
    """
    histories = ordered_histories(interactions)
    report_suspect_values(histories, isinstance(options, TableOptions) and options.item_separator is not None)
    counts = [len(histories)]
    histories = without_duplicates(histories, options.duplicates)
    counts.append(len(histories))
    histories = k_core(histories, options)
    counts.append(len(histories))
    histories, item_ids, untitled = _titled_histories(histories, titles, options)
    counts.append(len(histories))
    ambiguous = [item_id for item_id in item_ids if item_id in titles.ambiguous]
    if ambiguous:
        LOGGER.warning("%s", describe_ambiguous(titles, ambiguous))
    with (folder / "items.tsv").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{item_id}\t{titles.of_item.get(item_id, item_id)}\n" for item_id in item_ids)
    without_cover = None if covers is None else write_covers(folder, covers, item_ids, options.copy_covers)
    return Imported(
        users=write_histories(folder, histories),
        items=len(item_ids),
        interactions=counts[3],
        dropped_interactions=counts[2] - counts[3],
        duplicate_interactions=counts[0] - counts[1],
        core_interactions=counts[1] - counts[2],
        items_without_title=untitled,
        items_without_cover=without_cover,
        items_with_two_titles=len(ambiguous),
    )


def _titled_histories(
    histories: OrderedHistories, titles: Titles, options: ImportOptions
) -> tuple[OrderedHistories, pl.Series, int]:
    """Return the histories to write, the ids of their items in order, and the number of items without a title.

    Raises InputError for items without a title as the options say, and if no item is left.
    """
    codes = histories.used_items()
    item_ids = histories.item_ids.gather(codes).cast(pl.String)
    has_title = np.array([item_id in titles.of_item for item_id in item_ids], bool)
    if has_title.all():
        return histories, item_ids, 0
    untitled = item_ids.filter(pl.Series(~has_title))
    _report_untitled(untitled, len(item_ids), options.missing_titles, titles.problem)
    if options.missing_titles != "drop":
        return histories, item_ids, len(untitled)
    if not has_title.any():
        raise InputError("nothing is left: no item has a title; choose missing_titles: id, or the file of titles")
    stays = np.zeros(len(histories.item_ids), bool)
    stays[codes[has_title]] = True
    parts = [part.filter(stays[part["item"].to_numpy()]) for part in histories.parts]
    return histories.with_parts(parts), item_ids.filter(pl.Series(has_title)), len(untitled)


def _report_untitled(untitled: pl.Series, total: int, policy: str, problem: str) -> None:
    """Warn of items without a title, or raise InputError if the policy is "error".

    total: number of all items. problem: why no item has one, if that is so.
    """
    message = f"no title for {len(untitled):,} of {total:,} items ({first_few(untitled, len(untitled))})"
    if policy == "error":
        reason = f"{problem}; or " if problem else ""
        raise InputError(f"{message}; {reason}choose missing_titles: id or drop")
    action = "they are dropped" if policy == "drop" else "their ids stand for it"
    LOGGER.warning("%s: %s%s", message, action, f"; {problem}" if problem else "")
