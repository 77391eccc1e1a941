"""Add items to the catalogue of a trained run, give items new contents, and remove items.

A change is written as a whole or not at all, by the one process that holds the run. Nothing of the training changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...data import ItemContents
from ...errors import InputError, first_few
from ...setting_sources import PathLike
from ...states import EncoderPlaces
from ...training import EncodedItems, RunFolder, open_item_encoder
from ..trained_model import TrainedModel
from .catalogue import Catalogue
from .catalogue_changes import CatalogueChanges, TrainedBase
from .catalogue_file import read_changes, write_changes
from .new_items import open_new_items

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChangedCatalogue:
    """A run with its changed catalogue, and what the last change did."""

    model: TrainedModel
    added: int = 0
    updated: int = 0
    removed: int = 0

    @property
    def items(self) -> int:
        """Return how many items may be recommended."""
        return self.model.catalogue.available


def add_items(
    run: Path,
    items: object,
    images: PathLike | None = None,
    *,
    device: torch.device,
    encoders: EncoderPlaces | None = None,
    missing_images: str | None = None,
) -> ChangedCatalogue:
    """Encode new items by the run's encoders, and add them to its catalogue. They can be recommended at once.

    items, images: as `open_new_items` takes them. encoders: the places to which the run's encoders have moved.
    missing_images: "error", or "blank" for a blank image in place of one that cannot be read; None for the run's. An
    item that was removed may be added again; it keeps its number.

    Raises InputError, before anything is written, for items that cannot be used or that the catalogue has, contents
    that cannot be read, encoders that are not those of the run, and a run that another process writes.
    """
    with open_new_items(items, images) as contents, _held(run, device) as held:
        catalogue = held.catalogue
        known = [item_id for item_id in contents.item_ids if catalogue.has(item_id)]
        if known:
            raise InputError(
                f"{run}: expected new items, found {len(known)} that the catalogue has already "
                f"({first_few(known, len(known))}); update-items gives them new contents"
            )
        numbers = _numbers(catalogue, contents.item_ids)
        changes = held.encoded(contents, numbers, encoders, missing_images).with_returned(numbers)
        return ChangedCatalogue(held.written(changes), added=len(numbers))


def update_items(
    run: Path,
    items: object,
    images: PathLike | None = None,
    *,
    device: torch.device,
    encoders: EncoderPlaces | None = None,
    missing_images: str | None = None,
) -> ChangedCatalogue:
    """Encode the new contents of items of the catalogue. Their histories and training stay.

    The arguments and the errors are those of `add_items`, except that the catalogue must have the items. If the run was
    trained on since items were encoded, all of these have to be among the items.
    """
    with open_new_items(items, images) as contents, _held(run, device, may_be_outdated=True) as held:
        catalogue = held.catalogue
        if held.is_outdated:
            catalogue.refuse_unknown(contents.item_ids, "items")
            numbers = np.array([catalogue.numbers[item_id] for item_id in contents.item_ids], dtype=np.int64)
            held.refuse_remaining(numbers)
        else:
            numbers = catalogue.numbers_of(contents.item_ids, "items")
        changes = held.encoded(contents, numbers, encoders, missing_images)
        return ChangedCatalogue(held.written(changes), updated=len(numbers))


def remove_items(run: Path, item_ids: Iterable[str], *, device: torch.device) -> ChangedCatalogue:
    """Remove items from the catalogue of a run: they are never recommended again, and may still stand in histories.

    Items that are removed already are named in a warning. Raises InputError, before anything is written, for ids that
    the catalogue does not have, if no item would be left, and for a run that another process writes.
    """
    unique = list(dict.fromkeys(item_ids))
    with _held(run, device) as held:
        catalogue = held.catalogue
        catalogue.refuse_unknown(unique, "items")
        present = [item_id for item_id in unique if catalogue.has(item_id)]
        if absent := [item_id for item_id in unique if not catalogue.has(item_id)]:
            LOGGER.warning("%s: found %d removed already (%s)", run, len(absent), first_few(absent, len(absent)))
        if len(present) == catalogue.available:
            raise InputError(f"{run}: expected to keep an item, found that all {len(present)} would be removed")
        if not present:
            return ChangedCatalogue(held.model.with_catalogue(catalogue))
        numbers = np.array([catalogue.numbers[item_id] for item_id in present], dtype=np.int64)
        return ChangedCatalogue(held.written(held.changes.with_removed(numbers)), removed=len(numbers))


@dataclass
class _HeldRun:
    """A run that this process holds as its only writer, with its catalogue of now."""

    folder: RunFolder
    model: TrainedModel  # with the catalogue of the training
    changes: CatalogueChanges
    is_outdated: bool  # True if the run was trained on since items were encoded

    @property
    def catalogue(self) -> Catalogue:
        """Return the catalogue with the changes until now."""
        return self.changes.applied_to(self.model.catalogue)

    def encoded(
        self, contents: ItemContents, numbers: np.ndarray, encoders: EncoderPlaces | None, missing_images: str | None
    ) -> CatalogueChanges:
        """Return the changes with these items, encoded. numbers: of the items, int64 [N].

        Raises InputError as `add_items` does.
        """
        trained = self.model.catalogue
        of_training = np.where(numbers <= trained.trained, numbers, 0)
        with open_item_encoder(
            self.folder,
            contents,
            encoders or EncoderPlaces(),
            self.model.device,
            self.model.similarity,
            trained.training_counts,
            missing_images,
        ) as encoder:
            began = time.perf_counter()
            encoded = encoder.encode(of_training)
        LOGGER.debug("encoding %d items took %.2f s", len(numbers), time.perf_counter() - began)
        self._refuse_not_finite(contents, encoded)
        protocol = self.folder.config.protocol
        titles = contents.dataset(protocol).titles
        return self.changes.with_items(numbers, contents.item_ids, titles, *encoded)

    def refuse_remaining(self, numbers: np.ndarray) -> None:
        """Raise InputError if items that were encoded with other weights are not among these numbers."""
        lacking = ~np.isin(self.changes.numbers, numbers)
        if remaining := [item_id for item_id, is_lacking in zip(self.changes.item_ids, lacking) if is_lacking]:
            raise InputError(
                f"{self.folder.catalogue}: the run was trained on since its items were encoded; expected all "
                f"{len(self.changes.numbers)} of them in one call, and {len(remaining)} are missing "
                f"({first_few(remaining, len(remaining))})"
            )

    def written(self, changes: CatalogueChanges) -> TrainedModel:
        """Write the changes, and return the model with the changed catalogue."""
        write_changes(self.folder, changes)
        return self.model.with_catalogue(changes.applied_to(self.model.catalogue))

    def _refuse_not_finite(self, contents: ItemContents, encoded: EncodedItems) -> None:
        """Raise InputError, with the first few items, for vectors or coordinates that are not finite."""
        finite = encoded.vectors.isfinite().all(dim=1)
        if encoded.coordinates is not None:
            finite &= encoded.coordinates.isfinite().all(dim=1)
        if bad := [item_id for item_id, good in zip(contents.item_ids, finite.tolist()) if not good]:
            raise InputError(
                f"{self.folder.path}: found {len(bad)} of {len(finite)} items whose vectors are not finite "
                f"({first_few(bad, len(bad))})"
            )


@contextmanager
def _held(run: Path, device: torch.device, may_be_outdated: bool = False) -> Iterator[_HeldRun]:
    """Hold a run as its only writer. may_be_outdated: let changes pass that were made with other weights.

    Raises InputError if another process writes it, or if it cannot be loaded.
    """
    with RunFolder.open(run, writable=True) as folder:
        model = TrainedModel.load(run, device, changed=False)
        if folder.config.has_states and model.similarity is None:  # an earlier version's run without its cache
            raise InputError(
                f"{run}: has no coordinates of similarity for its items; `iisan-fast train --resume {run}` makes them "
                "from the run's cache"
            )
        base = TrainedBase.of(model.epoch, model.catalogue.vectors)
        changes = read_changes(folder)
        is_outdated = False
        if changes is None:
            dims = None if model.catalogue.coordinates is None else model.catalogue.coordinates.shape[1]
            changes = CatalogueChanges.none(base, model.catalogue.vectors.shape[1], dims)
        else:
            is_outdated = may_be_outdated and changes.is_outdated(base) and changes.base.items == base.items
            if not is_outdated:
                changes.refuse_other_weights(base, folder.catalogue)
        yield _HeldRun(folder, model, changes.with_base(base), is_outdated)


def _numbers(catalogue: Catalogue, item_ids: list[str]) -> np.ndarray:
    """Return the numbers of items to add: those that they had before they were removed, or the next ones."""
    numbers = []
    following = len(catalogue.item_ids) + 1
    for item_id in item_ids:
        if item_id in catalogue.numbers:
            numbers.append(catalogue.numbers[item_id])
        else:
            numbers.append(following)
            following += 1
    return np.array(numbers, dtype=np.int64)
