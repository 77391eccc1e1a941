"""Write histories: users.tsv, and where they are known times.tsv and splits.tsv."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ...progress import progress_bar
from .polars_module import pl
from .table import PARTS

LOGGER = logging.getLogger(__name__)


def write_histories(folder: Path, parts: Sequence[pl.DataFrame]) -> int:
    """Write the files of histories, and return the number of users.

    parts: as `ordered_histories` returns them. splits.tsv, of histories with parts of a split, holds how many of a
    user's interactions are in each part. times.tsv is left out if a history is not in the order of time.
    """
    joined = {"users.tsv": pl.col("item").cast(pl.String).str.join(" ")}
    columns = parts[0].columns if parts else []
    if "part" in columns:
        counts = [(pl.col("part") == number).sum().cast(pl.String) for number in range(len(PARTS))]
        joined["splits.tsv"] = pl.concat_str(counts, separator=" ")
    if "timestamp" in columns and _in_order_of_time(parts):
        joined["times.tsv"] = pl.col("timestamp").cast(pl.String).str.join(" ")
    users = 0
    with progress_bar("writing", sum(map(len, parts)), "interactions") as advance:
        for part in parts:
            lines = part.group_by("user", maintain_order=True).agg(text.alias(name) for name, text in joined.items())
            for name in joined:
                with (folder / name).open("ab") as file:
                    lines.select("user", name).write_csv(
                        file, include_header=False, separator="\t", quote_style="never"
                    )
            users += len(lines)
            advance(len(part))
    return users


def _in_order_of_time(parts: Sequence[pl.DataFrame]) -> bool:
    """Return True if the times of all histories do not fall; warn of the first one where they do."""
    if "part" not in parts[0].columns:
        return True
    falls = (pl.col("timestamp") < pl.col("timestamp").shift()) & (
        pl.col("user").to_physical() == pl.col("user").to_physical().shift()
    )
    first: str | None = None
    users = 0
    for part in parts:
        unordered = part.filter(falls)["user"].unique(maintain_order=True)
        users += len(unordered)
        if first is None and len(unordered):
            first = unordered[0]
    if first is None:
        return True
    LOGGER.warning(
        "times.tsv is left out: %s users, such as %s, have interactions of training after those of validation or test, "
        "and a history in the order of the split is not in the order of time",
        f"{users:,}",
        first,
    )
    return False
