"""Write histories: users.tsv, and where they are known times.tsv and splits.tsv."""

from __future__ import annotations

import logging
from pathlib import Path

from ....progress import progress_bar
from ..polars_module import pl
from ..table import PARTS
from .history_order import OrderedHistories

LOGGER = logging.getLogger(__name__)


def write_histories(folder: Path, histories: OrderedHistories) -> int:
    """Write the files of histories, and return the number of users.

    splits.tsv, of histories with parts of a split, holds how many of a user's interactions are in each part. times.tsv
    is left out if a history is not in the order of time.
    """
    columns = histories.parts[0].columns
    joined = {"users.tsv": pl.col("item").str.join(" ")}
    if "part" in columns:
        counts = [(pl.col("part") == number).sum().cast(pl.String) for number in range(len(PARTS))]
        joined["splits.tsv"] = pl.concat_str(counts, separator=" ")
    if "timestamp" in columns and _in_order_of_time(histories):
        joined["times.tsv"] = pl.col("timestamp").cast(pl.String).str.join(" ")
    users = 0
    with progress_bar("writing", len(histories), "interactions") as advance:
        for part in histories.parts:
            items = histories.item_ids.gather(part["item"]).cast(pl.String).alias("item")
            texts = [text.alias(name) for name, text in joined.items()]
            lines = part.with_columns(items).group_by("user", maintain_order=True).agg(texts)
            lines = lines.with_columns(histories.user_ids.gather(lines["user"]).cast(pl.String).alias("user"))
            for name in joined:
                with (folder / name).open("ab") as file:
                    lines.select("user", name).write_csv(
                        file, include_header=False, separator="\t", quote_style="never"
                    )
            users += len(lines)
            advance(len(part))
    return users


def _in_order_of_time(histories: OrderedHistories) -> bool:
    """Return True if the times of all histories do not fall; warn of the users where they do."""
    if "part" not in histories.parts[0].columns:
        return True
    user, time = pl.col("user"), pl.col("timestamp")
    falls = (time < time.shift()) & (user == user.shift())
    users = pl.concat([part.filter(falls)["user"].unique(maintain_order=True) for part in histories.parts])
    if not len(users):
        return True
    LOGGER.warning(
        "times.tsv is left out: %s users, such as %s, have interactions of training after those of validation or test, "
        "and a history in the order of the split is not in the order of time",
        f"{len(users):,}",
        histories.user_ids[int(users[0])],
    )
    return False
