"""Draw users of a run at random, and gather what a page shows of them: history, top ten, target and its rank."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...data import Split
from ...printable import printable
from ...training import BestRun
from ..histories.user_histories import UserHistories
from ..recommendation import recommend
from ..trained_model import TrainedModel

TOP = 10
MOST_HISTORY = 24  # items of a history on the page, the latest ones
MOST_CHARACTERS = 240  # of a title


class ShownItem(NamedTuple):
    """An item as the page shows it."""

    item_id: str
    title: str  # the id for an item without a title
    letters: str  # shown in place of a picture
    is_cold: bool  # True if it does not occur in training
    is_target: bool


class ShownUser(NamedTuple):
    """A user as the page shows it."""

    user_id: str
    history: list[ShownItem]  # oldest first
    earlier: int  # how many items of the history are left out, the oldest ones
    recommended: list[ShownItem]  # best first, without items of the history
    targets: int
    missed: list[ShownItem]  # the targets that are not in `recommended`
    place: int | None  # of the first target in `recommended`, counted from 1; None if there is none
    rank: str  # the least of a target in the whole catalogue, without items of the history; "" if all stand in it


def drawn_rows(count: int, users: int, seed: int) -> np.ndarray:
    """Return the rows of `users` of `count` users at random, ascending, without repetition, int64; all if fewer."""
    return np.sort(np.random.default_rng(seed).choice(count, size=min(users, count), replace=False))


def shown_users(
    best: BestRun, model: TrainedModel, titles: Sequence[str] | None, split: Split, rows: np.ndarray, ranks: np.ndarray
) -> list[ShownUser]:
    """Return users with their history and their top ten.

    model: the same run, with the catalogue of its training. titles: of the run's items by number - 1. split: of the
    run's sequences. rows: each user's first row in it. ranks: of all targets of the split, history masked. Raises
    InputError if a score is not finite.
    """
    if not len(rows):
        return []
    user_ids = [best.sequences.user_ids[user] for user in split.users[rows]]
    histories = [split.items[split.ends[row] - split.lengths[row] : split.ends[row]] for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    count = min(TOP, model.catalogue.available)
    parts = recommend(model, UserHistories(user_ids, offsets, np.concatenate(histories)), count)
    lists = [items for part in parts for items in part.items]
    shown = _Items(best, titles)
    ends = np.append(split.first_rows, len(split.targets))[np.searchsorted(split.first_rows, rows) + 1]
    return [
        shown.user(user_id, history, recommended[recommended > 0], split.targets[row:end], float(ranks[row:end].min()))
        for user_id, history, recommended, row, end in zip(user_ids, histories, lists, rows, ends)
    ]


class _Items:
    """The items of a run, by number."""

    def __init__(self, best: BestRun, titles: Sequence[str] | None) -> None:
        """Take a run and the titles of its items."""
        self.item_ids = best.item_ids
        self.titles = titles
        self.counts = best.sequences.training_counts

    def user(
        self, user_id: str, history: np.ndarray, recommended: np.ndarray, targets: np.ndarray, rank: float
    ) -> ShownUser:
        """Return a user. history, recommended, targets: item numbers. rank: the least of the targets."""
        places = np.flatnonzero(np.isin(recommended, targets))
        missed = targets[~np.isin(targets, recommended)]
        return ShownUser(
            user_id=plain(user_id),
            history=[self.item(number) for number in history[-MOST_HISTORY:].tolist()],
            earlier=max(0, len(history) - MOST_HISTORY),
            recommended=[self.item(number, targets) for number in recommended.tolist()],
            targets=len(targets),
            missed=[self.item(number, targets) for number in missed.tolist()],
            place=int(places[0]) + 1 if len(places) else None,
            rank=f"{rank:,.1f}".removesuffix(".0") if np.isfinite(rank) else "",
        )

    def item(self, number: int, targets: np.ndarray | tuple[()] = ()) -> ShownItem:
        """Return an item of a number. targets: the numbers of the user's targets, to mark them."""
        item_id = self.item_ids[number - 1]
        title = "" if self.titles is None else plain(html.unescape(self.titles[number - 1]))
        title = title or plain(item_id)
        letters = "".join(character for character in title if character.isalnum())[:2]
        return ShownItem(item_id, title, letters.upper(), not self.counts[number], number in targets)


def plain(text: str) -> str:
    """Return text of data on one line: control characters as escapes, the end of a very long one left out."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"
