"""Read the histories that a run has saved, and check every number in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import ProtocolConfig
from ..errors import InputError
from ..setting_fields import settings_of
from .array_files import checked_texts, read_arrays, unpack_texts
from .sequences import LEAVE_ONE_OUT, Sequences
from .text_array import TextArray, first_repeat

IDS = {"user_ids": "user_id_ends", "item_ids": "item_id_ends"}  # texts, and where each of them ends
SPLIT = ("training_ends", *(f"{name}_targets" for name in LEAVE_ONE_OUT))
COUNTS = tuple(f"{name}_target_counts" for name in LEAVE_ONE_OUT)  # only of a split with several targets a user
LEFT_OUT = tuple(f"{name}_without_history" for name in LEAVE_ONE_OUT)  # only of a split that leaves targets out
MOST_INPUTS = settings_of(ProtocolConfig)["max_inputs"].rules.maximum
MOST_WIDE_ITEMS = 1 << 24  # numbers of interactions that are made 8 bytes wide
MOST_LISTED_IDS = 1 << 20  # of users that are made strings
MOST_IDS = 1_000_000  # of a file of few bytes; each further byte may stand for one more
ALWAYS = ("user_ids", "item_ids", "offsets", "items", "max_inputs")


def load_sequences(path: Path) -> Sequences:
    """Read the file that `Sequences.save` wrote.

    Raises InputError, naming the file and the array, if it is missing or damaged, or holds numbers that cannot be.
    """
    arrays = read_arrays(path, (*ALWAYS, *IDS.values(), *SPLIT, *COUNTS, *LEFT_OUT))
    split = [name for name in SPLIT if name in arrays]  # files of older runs have none: leave-one-out
    optional = [name for names in (COUNTS, LEFT_OUT) if arrays.keys() & {*names} for name in names]
    for name in (*ALWAYS, *(SPLIT if split or optional else ()), *optional):
        if name not in arrays:
            raise InputError(f"{path}: array {name} is missing; restore the file")
    sequences = Sequences(
        user_ids=_unique_ids(arrays, "user_ids", path),
        item_ids=unique_ids(arrays, "item_ids", path),
        offsets=integers(arrays, "offsets", path),
        items=_items(arrays, path),
        max_inputs=int(integers(arrays, "max_inputs", path, dimensions=0)),
        training_ends=integers(arrays, "training_ends", path) if split else None,
        targets=_by_split(arrays, "targets", path),
        target_counts=_by_split(arrays, "target_counts", path),
        without_history=_left_out(arrays, path),
    )
    _check(sequences, path)
    return sequences


def _by_split(arrays: Mapping[str, np.ndarray], kind: str, path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of both splits by name; None if the file has none of this kind. Raises InputError."""
    names = {name: f"{name}_{kind}" for name in LEAVE_ONE_OUT}
    if not any(name in arrays for name in names.values()):
        return None
    return {name: integers(arrays, of_split, path) for name, of_split in names.items()}


def _left_out(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, int] | None:
    """Return how many targets of each split are left out; None if the file does not say. Raises InputError."""
    if LEFT_OUT[0] not in arrays:
        return None
    counts = {name: int(integers(arrays, f"{name}_without_history", path, dimensions=0)) for name in LEAVE_ONE_OUT}
    for name, count in counts.items():
        refuse_unfit(path, f"{name}_without_history", count < 0)
    return counts


def _items(arrays: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """Return the item numbers of histories, int64; as the file holds them if they are many. Raises InputError."""
    items = arrays["items"]
    many = items.dtype == np.int32 and items.ndim == 1 and len(items) > MOST_WIDE_ITEMS
    return items if many else integers(arrays, "items", path)


def unique_ids(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> list[str]:
    """Return the ids of an array as a list. Raises InputError as `_unique_ids` does."""
    return list(_unique_ids(arrays, name, path))


def _unique_ids(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> list[str] | TextArray:
    """Return the ids of an array: UTF-8 bytes with their ends, or text of one width in files of older versions.

    Many ids of the first kind stay packed. Raises InputError, naming the array, for anything else, for an id that
    stands twice, and for more ids than the file can hold.
    """
    array = arrays[name]
    ends = arrays.get(IDS[name])
    expected_kind = "U" if ends is None else "u"
    count = array.size if ends is None else ends.size
    if array.ndim != 1 or array.dtype.kind != expected_kind:
        raise InputError(f"{path}: array {name}: expected ids, found {array.dtype} of shape {array.shape}")
    if count > MOST_IDS + path.stat().st_size:
        raise InputError(
            f"{path}: array {name}: {count} ids in a file of {path.stat().st_size} bytes; restore the file"
        )
    try:
        unpack = checked_texts if count > MOST_LISTED_IDS else unpack_texts
        ids = array.tolist() if ends is None else unpack(array, ends)
    except ValueError as error:
        raise InputError(f"{path}: array {name} is damaged ({error}); restore the file") from None
    if first_repeat(ids) is not None:
        raise InputError(f"{path}: array {name} has an id twice; restore the file")
    return ids


def integers(arrays: Mapping[str, np.ndarray], name: str, path: Path, dimensions: int = 1) -> np.ndarray:
    """Return an array as int64. Raises InputError, naming it, unless it has integers and so many dimensions."""
    array = arrays[name]
    if array.dtype not in (np.int32, np.int64) or array.ndim != dimensions:
        form = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{path}: array {name}: expected integers in {dimensions} dimensions, found {form}")
    return array.astype(np.int64, copy=array.size <= MOST_WIDE_ITEMS)


def _check(sequences: Sequences, path: Path) -> None:
    """Raise InputError, naming the array, if the numbers of histories do not fit each other."""
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    whole = sequences.offsets[:1].tolist() == [0] and sequences.offsets[-1:].tolist() == [len(sequences.items)]
    refuse_unfit(path, "max_inputs", not 1 <= sequences.max_inputs <= MOST_INPUTS)
    refuse_unfit(path, "user_ids", not sequences.user_ids or len(sequences.user_ids) != len(starts))
    refuse_unfit(path, "offsets", not whole or (ends <= starts).any())
    refuse_unfit(path, "items", ((sequences.items < 1) | (sequences.items > len(sequences.item_ids))).any())
    cuts = sequences.training_ends
    refuse_unfit(path, "training_ends", cuts.shape != starts.shape or (cuts < starts).any() or (cuts > ends).any())
    for name, targets in sequences.targets.items():
        refuse_unfit(path, f"{name}_targets", targets.shape != starts.shape)
        in_history = (targets > starts) & (targets >= cuts) & (targets < ends)
        refuse_unfit(path, f"{name}_targets", not (in_history | (targets == -1)).all())
        counts = sequences.target_counts[name]
        refuse_unfit(path, f"{name}_target_counts", counts.shape != starts.shape)
        side_by_side = (counts >= 1) & (counts <= ends - targets)
        refuse_unfit(path, f"{name}_target_counts", not np.where(targets == -1, counts == 0, side_by_side).all())


def refuse_unfit(path: Path, name: str, wrong: bool | np.bool_) -> None:
    """Raise InputError, naming the array, if it is wrong."""
    if wrong:
        raise InputError(f"{path}: array {name} has numbers that do not fit the others; restore the file")
