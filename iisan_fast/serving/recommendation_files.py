"""Write recommendations part by part: JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import InputError
from ..files import whole_file
from .growing.catalogue import Catalogue
from .recommendation import Recommended

COLUMNS = ("user_id", "rank", "item_id", "score")


def check_format(path: Path) -> None:
    """Raise InputError if a file's suffix names no format of recommendations, or if its library is missing."""
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise InputError(f"{path}: expected a file named *{', *'.join(WRITERS)}, found {path.suffix or 'no suffix'}")
    if suffix == ".parquet":
        try:
            import polars  # noqa: F401
        except ImportError:
            raise InputError(f"{path}: Parquet needs polars; pip install 'iisan-fast[import]'") from None


def write_recommendations(path: Path, parts: Iterable[Recommended], catalogue: Catalogue) -> None:
    """Write recommendations into a file, whole or not at all. One part is in memory at a time.

    path: .jsonl for the objects of `json_lines`; .csv or .parquet for rows of user_id, rank (from 1), item_id and
    score. Raises InputError as `check_format` does, and for what must not be replaced, as a folder.
    """
    check_format(path)
    with whole_file(path) as temporary:
        WRITERS[path.suffix.lower()](temporary, parts, catalogue)


def json_lines(part: Recommended, catalogue: Catalogue) -> Iterator[str]:
    """Yield a JSON object for each user: user_id, items (ids, best first), their scores, by_popularity."""
    for user_id, items, scores, by_popularity in _users(part, catalogue):
        yield json.dumps({"user_id": user_id, "items": items, "scores": scores, "by_popularity": by_popularity})


def _users(part: Recommended, catalogue: Catalogue) -> Iterator[tuple[str, list[str], list[float], bool]]:
    """Yield the user id, the item ids, their scores and whether they are the popular ones, of each user.

    A score has the fewest digits that give the same float32.
    """
    item_ids = catalogue.item_ids
    counts = (part.items > 0).sum(axis=1).tolist()
    texts = part.scores.astype(str).tolist()
    rows = zip(part.user_ids, part.items.tolist(), texts, counts, part.by_popularity.tolist())
    for user_id, items, scores, count, by_popularity in rows:
        yield user_id, [item_ids[item - 1] for item in items[:count]], list(map(float, scores[:count])), by_popularity


def _rows(part: Recommended, catalogue: Catalogue) -> Iterator[tuple[str, int, str, float]]:
    """Yield the rows of a table, in the order of `COLUMNS`."""
    for user_id, items, scores, _ in _users(part, catalogue):
        for rank, (item_id, score) in enumerate(zip(items, scores), start=1):
            yield user_id, rank, item_id, score


def _write_json_lines(file: Path, parts: Iterable[Recommended], catalogue: Catalogue) -> None:
    """Write one JSON object a line."""
    with file.open("w", encoding="utf-8") as stream:
        for part in parts:
            stream.writelines(f"{line}\n" for line in json_lines(part, catalogue))


def _write_csv(file: Path, parts: Iterable[Recommended], catalogue: Catalogue) -> None:
    """Write a header and the rows."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for part in parts:
            writer.writerows(_rows(part, catalogue))


def _write_parquet(file: Path, parts: Iterable[Recommended], catalogue: Catalogue) -> None:
    """Write each part into a file beside `file`, in its temporary folder, and then all of them into one."""
    import polars as pl

    types = pl.Schema(dict(zip(COLUMNS, (pl.String, pl.Int32, pl.String, pl.Float32))))
    paths = []
    for part in parts:
        paths.append(file.with_name(f"part-{len(paths)}.parquet"))
        pl.DataFrame(list(_rows(part, catalogue)), schema=types, orient="row").write_parquet(paths[-1])
    pl.scan_parquet(paths, glob=False).sink_parquet(file)


WRITERS: dict[str, Callable[[Path, Iterable[Recommended], Catalogue], None]] = {
    ".jsonl": _write_json_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
