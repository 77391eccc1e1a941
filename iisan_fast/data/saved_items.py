"""Save and read the items of a run: ids, training counts and titles, beside which no history is needed to rank."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .array_files import pack_texts, read_arrays, unpack_texts, write_arrays
from .saved_sequences import integers, refuse_unfit, unique_ids

CONTENT = "items"
ALWAYS = ("item_ids", "item_id_ends", "training_counts")
TITLES = ("titles", "title_ends")


class RunItems(NamedTuple):
    """The catalogue with which a run was trained."""

    item_ids: list[str]  # item number i is item_ids[i - 1]
    training_counts: np.ndarray  # int64 [items + 1]: how often each item number occurs in training; 0 for padding
    titles: list[str] | None  # None for a run of an earlier version, and for a published one without titles

    def save(self, path: Path) -> None:
        """Write one .npz file, with checksums, which `load_items` reads."""
        arrays = dict(zip(ALWAYS[:2], pack_texts(self.item_ids))) | {"training_counts": self.training_counts}
        if self.titles is not None:
            arrays |= dict(zip(TITLES, pack_texts(self.titles)))
        write_arrays(path, arrays)


def load_items(path: Path) -> RunItems:
    """Read the file that `RunItems.save` wrote.

    Raises InputError, naming the file and the array, if it is missing or damaged, or holds numbers that cannot be.
    """
    arrays = read_arrays(path, (*ALWAYS, *TITLES), CONTENT)
    with_titles = any(name in arrays for name in TITLES)
    for name in (*ALWAYS, *(TITLES if with_titles else ())):
        if name not in arrays:
            raise InputError(f"{path}: array {name} is missing; restore the file")
    item_ids = unique_ids(arrays, "item_ids", path)
    counts = integers(arrays, "training_counts", path)
    refuse_unfit(path, "training_counts", len(counts) != len(item_ids) + 1 or (counts < 0).any() or counts[0] != 0)
    refuse_unfit(path, "training_counts", not counts.any())
    if not with_titles:
        return RunItems(item_ids, counts, None)
    try:
        titles = unpack_texts(arrays["titles"], arrays["title_ends"])
    except ValueError as error:
        raise InputError(f"{path}: array titles is damaged ({error}); restore the file") from None
    refuse_unfit(path, "titles", len(titles) != len(item_ids))
    return RunItems(item_ids, counts, titles)
