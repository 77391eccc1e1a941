"""Write and read catalogue.safetensors, the changes of a run's catalogue since its training.

It is one file with checksums, replaced as a whole: a run has all of a change or nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import pack_texts, unpack_texts
from ...errors import InputError
from ...training import RunFolder, read_checkpoint, save_checkpoint
from .catalogue import Catalogue
from .catalogue_changes import CatalogueChanges, TrainedBase

FORMAT = 1
ALWAYS = {
    "numbers": torch.int64,
    "item_ids": torch.uint8,
    "item_id_ends": torch.int64,
    "titles": torch.uint8,
    "title_ends": torch.int64,
    "vectors": torch.float32,
    "removed": torch.int64,
}
COORDINATES = "coordinates"
REMEDY = "or remove it and change the catalogue again"


def write_changes(folder: RunFolder, changes: CatalogueChanges) -> None:
    """Replace the changes of a run's catalogue. The folder must be held as the only writer.

    Raises OSError if the file cannot be written; the old one stays then.
    """
    texts = dict(zip(("item_ids", "item_id_ends"), pack_texts(changes.item_ids)))
    texts |= dict(zip(("titles", "title_ends"), pack_texts(changes.titles)))
    arrays = {"numbers": changes.numbers, "removed": changes.removed, **texts}
    tensors: dict[str, Tensor] = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    tensors["vectors"] = changes.vectors
    if changes.coordinates is not None:
        tensors[COORDINATES] = changes.coordinates
    base = changes.base
    state = {"format": FORMAT, "epoch": base.epoch, "items": base.items, "vectors_checksum": base.vectors_checksum}
    save_checkpoint(folder.catalogue, tensors, state)


def read_changes(folder: RunFolder) -> CatalogueChanges | None:
    """Return the changes of a run's catalogue, which may be of earlier weights; None if there are none.

    Raises InputError, naming the file and what to do, if it is damaged or has another format.
    """
    path = folder.catalogue
    if not path.exists():
        return None
    try:
        checkpoint = read_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}, {REMEDY}") from None
    state = checkpoint.state
    if state.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected format {FORMAT}, found {state.get('format')!r}; use the version that wrote it"
        )
    try:
        return _changes(checkpoint.tensors, state)
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}; restore the file from a copy, {REMEDY}") from None


def changed_catalogue(run: Path, epoch: int, trained: Catalogue) -> Catalogue:
    """Return the catalogue of a run with its changes. epoch: of the best checkpoint. trained: of the training.

    Raises InputError as `read_changes` does, and if the run was trained on since items were encoded.
    """
    folder = RunFolder(run)
    changes = read_changes(folder)
    if changes is None:
        return trained
    changes.refuse_other_weights(TrainedBase.of(epoch, trained.vectors), folder.catalogue)
    return changes.applied_to(trained)


def _changes(tensors: dict[str, Tensor], state: dict[str, Any]) -> CatalogueChanges:
    """Return the changes of a file's content. Raises ValueError if its parts do not fit each other."""
    _refuse_other_tensors(tensors)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    items = state.get("items")
    checksum = state.get("vectors_checksum")
    if type(items) is not int or items < 1 or not isinstance(checksum, str):
        raise ValueError("expected the number of trained items and a checksum of their vectors")
    changes = CatalogueChanges(
        base=TrainedBase(state["epoch"], items, checksum),
        numbers=arrays["numbers"],
        item_ids=unpack_texts(arrays["item_ids"], arrays["item_id_ends"]),
        titles=unpack_texts(arrays["titles"], arrays["title_ends"]),
        vectors=tensors["vectors"],
        coordinates=tensors.get(COORDINATES),
        removed=arrays["removed"],
    )
    _refuse_unfit(changes)
    return changes


def _refuse_other_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the names, dtypes and dimensions of a catalogue's changes."""
    dtypes = ALWAYS | ({COORDINATES: torch.float32} if COORDINATES in tensors else {})
    if tensors.keys() != dtypes.keys():
        raise ValueError(f"expected the tensors {', '.join(sorted(dtypes))}, found {', '.join(sorted(tensors))}")
    for name, dtype in dtypes.items():
        dimensions = 2 if name in ("vectors", COORDINATES) else 1
        if tensors[name].dtype != dtype or tensors[name].ndim != dimensions:
            raise ValueError(f"{name}: expected {dtype} in {dimensions} dimensions")


def _refuse_unfit(changes: CatalogueChanges) -> None:
    """Raise ValueError unless all parts are of the same items, whose numbers can be."""
    numbers = changes.numbers
    items = changes.base.items
    added = numbers[numbers > items]
    if (np.diff(numbers) <= 0).any() or (len(numbers) and numbers[0] < 1):
        raise ValueError("numbers: expected ascending numbers from 1")
    if not np.array_equal(added, np.arange(items + 1, items + 1 + len(added))):
        raise ValueError("numbers: expected those of added items without a gap")
    removed = changes.removed
    last = items + len(added)
    if len(removed) and ((np.diff(removed) <= 0).any() or removed[0] < 1 or removed[-1] > last):
        raise ValueError(f"removed: expected ascending numbers from 1 to {last}")
    sized = {"item_ids": changes.item_ids, "titles": changes.titles, "vectors": changes.vectors}
    if changes.coordinates is not None:
        sized[COORDINATES] = changes.coordinates
    for name, values in sized.items():
        if len(values) != len(numbers):
            raise ValueError(f"{name}: expected {len(numbers)} items, found {len(values)}")
