"""Hold what has changed in a run's catalogue since its training, and apply it to the catalogue of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...checksums import tensor_checksums
from ...errors import InputError
from .catalogue import Catalogue

VECTORS = "item_vectors"


@dataclass(frozen=True)
class TrainedBase:
    """The best checkpoint that changes of a catalogue were made with."""

    epoch: int  # counted from 1; 0 for the method neighbours
    items: int
    vectors_checksum: str  # of its item vectors

    @classmethod
    def of(cls, epoch: int, vectors: Tensor) -> TrainedBase:
        """Describe a best checkpoint by its epoch and its item vectors [items, d]."""
        checksums = tensor_checksums({VECTORS: vectors.detach().cpu().contiguous()})
        return cls(epoch, len(vectors), checksums[VECTORS])


@dataclass(frozen=True)
class CatalogueChanges:
    """The items that were encoded since the training, and the items that were removed.

    Encoded items stand in the order of their numbers. Those up to `base.items` replace the content of a trained item;
    those above were added, and their numbers have no gap.
    """

    base: TrainedBase
    numbers: np.ndarray  # int64 [C], ascending
    item_ids: list[str]  # [C]
    titles: list[str]  # [C]
    vectors: Tensor  # float32 [C, d]
    coordinates: Tensor | None  # float32 [C, dims]; None for a run without similarity
    removed: np.ndarray  # int64 [R], ascending numbers

    @classmethod
    def none(cls, base: TrainedBase, width: int, dims: int | None) -> CatalogueChanges:
        """Return no changes. width: of the item vectors. dims: of the coordinates; None without similarity."""
        coordinates = None if dims is None else torch.empty(0, dims)
        nothing = np.zeros(0, dtype=np.int64)
        return cls(base, nothing, [], [], torch.empty(0, width), coordinates, nothing)

    @property
    def added(self) -> int:
        """Return how many items were added, those that were removed again too."""
        return int((self.numbers > self.base.items).sum())

    def with_items(
        self,
        numbers: np.ndarray,
        item_ids: Sequence[str],
        titles: Sequence[str],
        vectors: Tensor,
        coordinates: Tensor | None,
    ) -> CatalogueChanges:
        """Return the changes with N items more, or in place of those that have the same numbers.

        numbers: int64 [N], each once; those of added items go on from the last number.
        """
        joined = np.concatenate([self.numbers, numbers])
        _, last = np.unique(joined[::-1], return_index=True)  # the new ones stand in place of the old
        chosen = len(joined) - 1 - last
        ids = [*self.item_ids, *item_ids]
        texts = [*self.titles, *titles]
        rows = torch.from_numpy(chosen)
        both = self.coordinates is not None and coordinates is not None
        return replace(
            self,
            numbers=joined[chosen],
            item_ids=[ids[place] for place in chosen],
            titles=[texts[place] for place in chosen],
            vectors=torch.cat([self.vectors, vectors])[rows],
            coordinates=torch.cat([self.coordinates, coordinates])[rows] if both else None,
        )

    def with_base(self, base: TrainedBase) -> CatalogueChanges:
        """Return the changes as made with another checkpoint; all items have to be encoded again."""
        return replace(self, base=base)

    def with_removed(self, numbers: np.ndarray) -> CatalogueChanges:
        """Return the changes with these items removed, int64 [N]."""
        return replace(self, removed=np.union1d(self.removed, numbers))

    def with_returned(self, numbers: np.ndarray) -> CatalogueChanges:
        """Return the changes with these items, int64 [N], no longer removed."""
        return replace(self, removed=np.setdiff1d(self.removed, numbers))

    def is_outdated(self, base: TrainedBase) -> bool:
        """Return True if items were encoded with another checkpoint than this one."""
        return self.base != base and len(self.numbers) > 0

    def refuse_other_weights(self, base: TrainedBase, path: Path) -> None:
        """Raise InputError if the run was trained on since the changes were made. path: of the file, for messages."""
        if self.base.items != base.items:
            raise InputError(
                f"{path}: its changes are of a run with {self.base.items} items, and this run has {base.items}; "
                "remove the file"
            )
        if self.is_outdated(base):
            raise InputError(
                f"{path}: the run was trained on since its items were encoded (best epoch {self.base.epoch} there, "
                f"{base.epoch} now); `iisan-fast update-items {path.parent} ITEMS` with all of these "
                f"{len(self.numbers)} items encodes them again, or remove the file to go on without them"
            )

    def applied_to(self, trained: Catalogue) -> Catalogue:
        """Return the catalogue with the changes. trained: the catalogue of the training."""
        rows = torch.from_numpy(self.numbers - 1)
        total = trained.trained + self.added
        is_removed = np.zeros(total, dtype=bool)
        is_removed[self.removed - 1] = True
        counts = np.zeros(total + 1, dtype=trained.training_counts.dtype)
        counts[: trained.trained + 1] = trained.training_counts
        return replace(
            trained,
            item_ids=_with_texts(trained.item_ids, self.numbers, self.item_ids),
            titles=None if trained.titles is None else _with_texts(trained.titles, self.numbers, self.titles),
            training_counts=counts,
            is_removed=is_removed,
            vectors=_with_rows(trained.vectors, rows, self.vectors, total),
            coordinates=_with_coordinates(trained.coordinates, rows, self.coordinates, total),
        )


def _with_texts(trained: list[str], numbers: np.ndarray, texts: Sequence[str]) -> list[str]:
    """Return the texts of all items: those of the training, of which some are replaced, then those of added items."""
    changed = list(trained)
    for number, text in zip(numbers.tolist(), texts):
        if number <= len(trained):
            changed[number - 1] = text
        else:
            changed.append(text)
    return changed


def _with_coordinates(trained: Tensor | None, rows: Tensor, values: Tensor | None, total: int) -> Tensor | None:
    """Return `_with_rows` of the coordinates; None without."""
    return None if trained is None or values is None else _with_rows(trained, rows, values, total)


def _with_rows(trained: Tensor, rows: Tensor, values: Tensor, total: int) -> Tensor:
    """Return a matrix [total, width] of the trained rows, in which some are replaced and the added ones follow."""
    changed = trained.new_empty(total, trained.shape[1])
    changed[: len(trained)] = trained
    changed[rows.to(trained.device)] = values.to(trained)
    return changed
