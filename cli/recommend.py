"""iisan-fast recommend: the best items of a run for a history, a file of users, or all users of its dataset."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from ..progress import progress_bar
from ..ranks import joined_ranks
from .help_pages import DATA, OUTPUT, RECOMMENDATION, command, option
from .options import FILE, FOLDER, device_option, writable_file
from .output import cell, print_counts, print_json, print_table, print_text
from .verbosity import report, verbosity_options

if TYPE_CHECKING:
    import numpy as np

    from ..serving import Catalogue, Recommended, TrainedModel, UserHistories

EXAMPLES = (
    "iisan-fast recommend runs/first --history i3,i7,i12",
    "iisan-fast recommend runs/first --users visitors.csv --out best.parquet",
    "iisan-fast recommend runs/first --allow in-stock.txt --out best.jsonl",
)


@command(examples=EXAMPLES, short_help="Recommend items of a run for histories.")
@click.argument("run", type=FOLDER)
@option(
    "--history",
    "history",
    group=DATA,
    multiple=True,
    metavar="IDS",
    help="Item ids of one history, oldest first, with commas between; repeat it for an id that has a comma.",
)
@option(
    "--users",
    group=DATA,
    type=FILE,
    help="Histories of users in a .tsv, .csv, .parquet or .jsonl file; by default all users of the run's dataset.",
)
@option(
    "--unknown",
    group=DATA,
    type=click.Choice(["error", "skip"]),
    default="error",
    help="Refuse item ids that the run does not have, or leave them out.",
)
@option("--top-k", group=RECOMMENDATION, type=int, default=10, metavar="K", help="Items for each user.")
@option("--keep-history", group=RECOMMENDATION, is_flag=True, help="Recommend the items of a user's history too.")
@option(
    "--allow",
    group=RECOMMENDATION,
    multiple=True,
    metavar="FILE|IDS",
    help="The only items to recommend: ids with commas between, or a file with one id a line or a column item_id.",
)
@option("--deny", group=RECOMMENDATION, multiple=True, metavar="FILE|IDS", help="Items never to recommend, as --allow.")
@option(
    "--out",
    group=OUTPUT,
    type=FILE,
    callback=writable_file,
    help="File for the result, .jsonl, .csv or .parquet, in place of standard output.",
)
@device_option
@option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print JSON in place of tables.")
@verbosity_options
def recommend(
    run: Path,
    history: tuple[str, ...],
    users: Path | None,
    unknown: str,
    top_k: int,
    keep_history: bool,
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Print the items that RUN recommends, best first: a table for --history, a JSON object a line for many users.

    A user without history gets the most popular items.
    """
    _refuse_both(history, users)
    from .. import serving  # imports torch
    from ..devices import torch_device

    def read() -> tuple[TrainedModel, UserHistories, np.ndarray | None]:
        if out is not None:
            serving.check_format(out)
        model = serving.TrainedModel.load(run, torch_device(device))
        catalogue = model.catalogue
        histories = _histories(run, history, users, catalogue, unknown)
        lists = {"--allow": allow, "--deny": deny}
        chosen = [_listed(name, values, catalogue) if values else None for name, values in lists.items()]
        return model, histories, serving.allowed_items(catalogue, *chosen)

    ranks = joined_ranks("recommend")
    model, histories, allowed = ranks.all_do(read)
    counted = _Counted(len(histories.user_ids), histories.unknown)
    with closing(serving.recommend(model, histories, top_k, not keep_history, allowed, ranks)) as parts:
        if not ranks.is_first:
            deque(parts, maxlen=0)  # this rank computes its share, which rank 0 gets
        elif history and out is None and not as_json:
            _print_items(model, next(parts))
        else:
            _write(counted.parts(parts), model.catalogue, out)
            _print_summary(out, counted, as_json)


def _write(parts: Iterator[Recommended], catalogue: Catalogue, out: Path | None) -> None:
    """Write recommendations into a file, or without one as JSON lines on standard output."""
    from ..serving import json_lines, write_recommendations

    if out is not None:
        write_recommendations(out, parts, catalogue)
        return
    for part in parts:
        print_text("\n".join(json_lines(part, catalogue)))


@dataclass
class _Counted:
    """Count the users, the unknown ids that were left out, and the users who get the popular items so far."""

    users: int
    unknown: int
    by_popularity: int = 0

    def parts(self, parts: Iterable[Recommended]) -> Iterator[Recommended]:
        """Yield the parts, count their users, and show the progress."""
        with progress_bar("recommend", self.users, "users") as advance:
            for part in parts:
                self.by_popularity += int(part.by_popularity.sum())
                advance(len(part.user_ids))
                yield part

    def rows(self) -> dict[str, int]:
        """Return the counts by name."""
        return {"users": self.users, "by popularity": self.by_popularity, "unknown items": self.unknown}


def _refuse_both(history: Sequence[str], users: Path | None) -> None:
    """Raise InputError if the histories are named in two ways."""
    if history and users is not None:
        raise InputError("--history, --users: expected one of them, found both")


def _histories(
    run: Path, history: Sequence[str], users: Path | None, catalogue: Catalogue, unknown: str
) -> UserHistories:
    """Return the histories to rank for. Raises InputError for a wrong file, or for ids that are refused."""
    from ..serving import UserHistories, UserRow, number_histories, read_histories

    if users is not None:
        return read_histories(users, catalogue, unknown)
    if not history:
        return UserHistories.of_run(run)
    item_ids = [item_id for value in history for item_id in _split(value, catalogue)]
    row = UserRow("0", item_ids, "--history")
    return number_histories([row], catalogue, "--history", unknown)


def _listed(name: str, values: Sequence[str], catalogue: Catalogue) -> list[str]:
    """Return the item ids of an option's values: each is a file of ids, or ids with commas between.

    Raises InputError, naming the option, for a value that is neither, and for a file that `read_item_ids` refuses.
    """
    from ..serving import read_item_ids

    item_ids: list[str] = []
    for value in values:
        words = _split(value, catalogue)
        if value not in catalogue.numbers and Path(value).is_file():
            words = read_item_ids(Path(value))
        elif len(words) < 2 and value not in catalogue.numbers:
            raise InputError(f"{name}: expected item ids of the run, or a file with one a line, found {value!r}")
        item_ids += words
    return item_ids


def _split(value: str, catalogue: Catalogue) -> list[str]:
    """Return the ids that commas separate, or one id of the catalogue that has commas."""
    return [value] if value in catalogue.numbers else [word for part in value.split(",") if (word := part.strip())]


def _print_items(model: TrainedModel, part: Recommended) -> None:
    """Print a table of one user's items with their ranks, titles and scores."""
    from rich.table import Table

    catalogue = model.catalogue
    items = part.items[0].tolist()
    recommended = sum(item > 0 for item in items)
    captions = ["the most popular items, because the history is empty"] if part.by_popularity[0] else []
    captions += [f"{recommended} of {len(items)} items, because no more are left"] if recommended < len(items) else []
    table = Table(
        title=cell(f"{model.run}, epoch {model.epoch}" if model.epoch else str(model.run)),
        caption="; ".join(captions) or None,
    )
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("title", ratio=1)
    table.add_column("score", justify="right")
    for rank, (item, score) in enumerate(zip(items, part.scores[0].tolist()), start=1):
        if item:
            title = catalogue.titles[item - 1] if catalogue.titles else "-"
            table.add_row(str(rank), cell(catalogue.item_ids[item - 1]), cell(title), f"{score:.4f}")
    print_table(table)


def _print_summary(out: Path | None, counted: _Counted, as_json: bool) -> None:
    """Print the counts of what was written into a file, or into standard output: then on standard error."""
    rows = counted.rows()
    if out is None:
        report(", ".join(f"{value:,} {name}" for name, value in rows.items()))
    elif as_json:
        print_json({"out": str(out), **{name.replace(" ", "_"): value for name, value in rows.items()}})
    else:
        print_counts(f"written to {out}", {name: f"{value:,}" for name, value in rows.items()})
