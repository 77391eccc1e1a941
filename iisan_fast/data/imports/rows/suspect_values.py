"""Warn of values that can be read and are likely to mean something else: missing ids, lists, and times of two units."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ....errors import first_few
from ..polars_module import pl
from ..writing.history_order import OrderedHistories
from .times import NO_TIME

LOGGER = logging.getLogger(__name__)
IDS_AT_ONCE = 500_000
BETWEEN_IDS = "[,;|]"
# The times from 1973 to 2286, by their unit; no number is in two of these ranges.
UNITS = {"seconds": (10**8, 10**10), "milliseconds": (10**11, 10**13), "microseconds": (10**14, 10**16)}


def report_suspect_values(histories: OrderedHistories, items_are_split: bool) -> None:
    """Warn of suspect ids and times, which stay as they are. items_are_split: the user has named an item separator."""
    for name, ids in (("user", histories.user_ids), ("item", histories.item_ids)):
        _report_missing(histories, name, ids)
    if not items_are_split:
        _report_lists(histories.item_ids)
    times = [part["timestamp"] for part in histories.parts if "timestamp" in part.columns]
    if times:
        _report_units(times)


def _report_missing(histories: OrderedHistories, name: str, ids: pl.Series) -> None:
    """Warn of ids that are usual words for a missing value, as pandas and R write them."""
    codes: list[int] = []
    words: list[str] = []
    for start, texts in _texts(ids):
        missing = texts.is_in([*NO_TIME])
        codes += [start + place for place in missing.arg_true()]
        words.extend(texts.filter(missing))
    if not words:
        return
    rows = sum(part[name].is_in(codes).sum() for part in histories.parts)
    LOGGER.warning(
        "%s ids that look like missing values: %s (%s interactions); if they are, leave such rows out of the source",
        name,
        first_few(map(repr, words), len(words)),
        f"{rows:,}",
    )


def _report_lists(item_ids: pl.Series) -> None:
    """Warn of item ids that may be lists of ids."""
    several = [text for _, texts in _texts(item_ids) for text in texts.filter(texts.str.contains(BETWEEN_IDS))]
    if several:
        LOGGER.warning(
            "%s of %s item ids hold a comma, semicolon or bar, such as %r; if they are lists, name what stands between "
            "their ids with --item-separator",
            f"{len(several):,}",
            f"{len(item_ids):,}",
            several[0],
        )


def _report_units(times: list[pl.Series]) -> None:
    """Warn of times that look like two units."""
    if max(part.max() for part in times) < UNITS["milliseconds"][0]:
        return
    units = [
        name
        for name, (start, end) in UNITS.items()
        if any(part.is_between(start, end, closed="left").any() for part in times)
    ]
    if len(units) > 1:
        LOGGER.warning(
            "times look like %s, from %s to %s, and are compared as they are; write all in one unit",
            " and ".join(units),
            min(part.min() for part in times),
            max(part.max() for part in times),
        )


def _texts(ids: pl.Series) -> Iterator[tuple[int, pl.Series]]:
    """Yield the texts of ids, some at a time, and the place of the first."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        yield start, ids[start : start + IDS_AT_ONCE].cast(pl.String)
