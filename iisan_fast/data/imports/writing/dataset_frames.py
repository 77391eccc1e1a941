"""Write frames of interactions and of items as a dataset folder, by default into the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ....errors import InputError, first_few
from ....files import absolute_path, cache_folder, whole_folder
from ...frames import as_polars
from ..bad_rows import BadRows
from ..options import ImportOptions
from ..polars_module import pl
from ..rows.interactions import read_interactions
from ..rows.row_checks import fitting_rows
from ..rows.titles import Titles, titles_of
from ..table import InteractionSource
from .dataset import write_dataset

LOGGER = logging.getLogger(__name__)
FORM = 1  # of the folder; another one gives equal frames another folder
ROWS_AT_ONCE = 250_000
INTERACTIONS, ITEMS, CAPTIONS = "interactions", "items", "captions"  # as messages call the frames
DATABASE_NAME = "images.lmdb"  # of the link to a database of images


class FrameTable:
    """A frame as a table of rows, as `read_interactions` reads it."""

    unit = "row"
    names_may_be_data = False

    def __init__(self, frame: pl.DataFrame, name: str) -> None:
        """Take a frame and its name in messages."""
        self.path = Path(name)
        self.columns = frame.columns
        self._frame = frame

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the frame}), and each row's number from 1 as `place`.

        bad_rows, is_row: not used, since each row of a frame has all columns.
        """
        selected = self._frame.select(pl.col(column).alias(name) for name, column in columns.items())
        yield from selected.with_row_index("place", offset=1).iter_slices(ROWS_AT_ONCE)


def write_frames(
    interactions: object, items: object, images: Path | None = None, captions: object = None, folder: Path | None = None
) -> Path:
    """Write a dataset folder from frames, and return it. Equal frames without `folder` give the same folder again.

    interactions: the columns user_id, item_id and, if there are times, timestamp. items: item_id, title and, if there
    are captions, caption; these may also come as another frame with item_id and caption. Other columns are not read,
    and items without interactions are left out, with a warning.
    images: a folder of images named by item id, or an LMDB of
    images; the dataset gets a link to it. folder: where the dataset is written, which must not exist; by default in the
    user's cache folder, under a name made of the content.

    Raises InputError for what is no frame, a missing column, an unfit or repeated id, an item without a title, an
    interaction of an item that is not among the items, an unfit timestamp, images that are not there, and if `folder`
    exists.
    """
    table = _read_interactions(interactions)
    items_frame = _checked_items(items, ITEMS, ("item_id", "title"))
    titles = _read_titles(items_frame)
    _refuse_unknown_items(table, titles)
    _report_unused_items(table, titles)
    texts = _read_captions(items_frame, captions, titles)
    images = None if images is None else absolute_path(images)
    if folder is not None:
        _write(folder, table, titles, texts, images)
        return folder
    name = _digest(table, titles, texts, images)[:16]
    cached = cache_folder() / "datasets" / name
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(cached, table, titles, texts, images)
        except (InputError, OSError):
            if not cached.is_dir():  # or else another process has written it meanwhile
                raise
    LOGGER.info("dataset of the frames: %s", cached)
    return cached


def _read_interactions(interactions: object) -> pl.DataFrame:
    """Return the interactions as `read_interactions` does. Raises InputError for unfit ones."""
    frame = as_polars(interactions, INTERACTIONS)
    _refuse_missing_columns(frame, INTERACTIONS, ("user_id", "item_id"))
    columns = {"user": "user_id", "item": "item_id"}
    if "timestamp" in frame.columns:
        columns["timestamp"] = "timestamp"
        frame = frame.with_columns(_times(frame["timestamp"]))
    bad_rows = BadRows(Path(INTERACTIONS), "error", FrameTable.unit, hint="correct it, or leave out the row")
    return read_interactions([InteractionSource(FrameTable(frame, INTERACTIONS), columns, bad_rows)])


def _times(column: pl.Series) -> pl.Series:
    """Return timestamps that are numbers, text or points in time. Raises InputError for another type."""
    kind = column.dtype
    if kind.is_numeric() or kind in (pl.String, pl.Null, pl.Date, pl.Datetime):
        return column
    raise InputError(f"{INTERACTIONS}: timestamp: expected numbers or points in time, found {kind}")


def _checked_items(items: object, name: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """Return a frame with a row an item. Raises InputError for a missing column, and for an unfit or repeated id."""
    frame = as_polars(items, name)
    _refuse_missing_columns(frame, name, columns)
    bad_rows = BadRows(Path(name), "error", FrameTable.unit, hint="correct it, or leave out the row")
    for batch in FrameTable(frame, name).batches({"item": "item_id"}, bad_rows):
        fitting_rows(batch, bad_rows)
    ids = frame["item_id"]
    repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
    if len(repeated):
        few = first_few(repeated, len(repeated))
        raise InputError(f"{name}: expected each item_id once, found several rows of {few}; keep one row of each")
    return frame


def _read_titles(frame: pl.DataFrame) -> dict[str, str]:
    """Return the title of each item by its id. Raises InputError, listing the first few, for items without one."""
    titles = _texts(frame, ITEMS, "title")
    untitled = [item_id for item_id in frame["item_id"] if item_id not in titles]
    if untitled:
        few = first_few(untitled, len(untitled))
        raise InputError(f"{ITEMS}: no title for {len(untitled):,} of {len(frame):,} items ({few}); give each a title")
    return titles


def _read_captions(items: pl.DataFrame, captions: object, titles: Mapping[str, str]) -> dict[str, str]:
    """Return the captions of the items that have one, by id: from their frame, or from the column of the items.

    Raises InputError for captions in both places, and for those of items that are not among the items.
    """
    in_items = "caption" in items.columns
    if captions is None:
        return _texts(items, ITEMS, "caption") if in_items else {}
    if in_items:
        raise InputError(f"{CAPTIONS}: {ITEMS} has a column caption already; give captions in one place")
    texts = _texts(_checked_items(captions, CAPTIONS, ("item_id", "caption")), CAPTIONS, "caption")
    unknown = [item_id for item_id in texts if item_id not in titles]
    if unknown:
        few = first_few(unknown, len(unknown))
        raise InputError(f"{CAPTIONS}: {len(unknown):,} of its items are not in {ITEMS} ({few}); leave them out")
    return texts


def _texts(frame: pl.DataFrame, name: str, column: str) -> dict[str, str]:
    """Return the texts of a column that are not blank, by item id. Raises InputError if it holds no text."""
    texts = frame[column]
    if texts.dtype.is_nested() or texts.dtype in (pl.Object, pl.Binary):
        raise InputError(f"{name}: {column}: expected text, found {texts.dtype}")
    return titles_of(zip(frame["item_id"], texts.cast(pl.String))).of_item


def _refuse_missing_columns(frame: pl.DataFrame, name: str, columns: tuple[str, ...]) -> None:
    """Raise InputError unless a frame has these columns."""
    for column in columns:
        if column not in frame.columns:
            names = first_few(frame.columns, len(frame.columns), limit=10) or "none"
            raise InputError(f"{name}: expected the columns {', '.join(columns)}, found {names}; rename them")


def _refuse_unknown_items(interactions: pl.DataFrame, titles: Mapping[str, str]) -> None:
    """Raise InputError, listing the first few, for interactions of items that have no row among the items."""
    item_ids = interactions["item"].unique(maintain_order=True)
    unknown = [item_id for item_id in item_ids if item_id not in titles]
    if unknown:
        few = first_few(unknown, len(unknown))
        hint = f"add them to {ITEMS}, or leave out their interactions"
        raise InputError(
            f"{INTERACTIONS}: {len(unknown):,} of {len(item_ids):,} items are not in {ITEMS} ({few}); {hint}"
        )


def _report_unused_items(interactions: pl.DataFrame, titles: Mapping[str, str]) -> None:
    """Warn of items that occur in no interaction, which `write_dataset` leaves out."""
    used = set(interactions["item"].unique().cast(pl.String))
    unused = [item_id for item_id in titles if item_id not in used]
    if unused:
        few = first_few(unused, len(unused))
        counts = f"{len(unused):,} of {len(titles):,}"
        LOGGER.warning("%s: %s occur in no interaction (%s) and are left out", ITEMS, counts, few)


def _write(
    destination: Path,
    interactions: pl.DataFrame,
    titles: Mapping[str, str],
    captions: Mapping[str, str],
    images: Path | None,
) -> None:
    """Write the dataset folder, whole or not at all. Raises InputError if it exists, or if there are no such images."""
    database = None
    if images is not None and (images.suffix == ".lmdb" or (images / "data.mdb").is_file()):
        database = images
        if not database.exists():
            raise InputError(f"{database}: no such database of images")
    with whole_folder(destination) as folder:
        write_dataset(
            folder, interactions, Titles({**titles}), images if database is None else None, ImportOptions("error")
        )
        if database is not None:
            (folder / DATABASE_NAME).symlink_to(database, target_is_directory=database.is_dir())
        used = interactions["item"].unique(maintain_order=True)
        lines = [f"{item_id}\t{captions[item_id]}\n" for item_id in used if item_id in captions]
        if lines:
            with (folder / "captions.tsv").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)


def _digest(
    interactions: pl.DataFrame, titles: Mapping[str, str], captions: Mapping[str, str], images: Path | None
) -> str:
    """Return the sha256 (hex) of all that the dataset folder is made of."""
    digest = hashlib.sha256(f"form {FORM}, columns {interactions.columns}\n".encode())
    for name in ("user", "item"):
        ids = interactions[name].unique(maintain_order=True).cast(pl.String)
        digest.update(json.dumps(ids.to_list()).encode())
        digest.update(interactions[name].to_physical().cast(pl.Int64).to_numpy().tobytes())
    if "timestamp" in interactions.columns:
        digest.update(interactions["timestamp"].to_numpy().tobytes())
    digest.update(json.dumps([[*titles.items()], sorted(captions.items()), str(images)]).encode())
    return digest.hexdigest()
