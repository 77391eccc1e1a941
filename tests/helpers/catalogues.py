"""Changes of a catalogue since the training."""

from __future__ import annotations

import numpy as np
import torch

from iisan_fast.serving.growing.catalogue_changes import CatalogueChanges, TrainedBase


def some_changes(value: float = 1.0, dims: int | None = 3) -> CatalogueChanges:
    """Return changes of a run of three items: one updated, two added, two removed; all numbers are `value`."""
    base = TrainedBase(2, 3, "0123456789abcdef")
    changes = CatalogueChanges.none(base, 4, dims)
    coordinates = None if dims is None else torch.full((3, dims), value)
    titles = ["Zwölf", "", "日本"]
    changes = changes.with_items(
        np.array([2, 4, 5]), ["b", "d" * 300, "é"], titles, torch.full((3, 4), value), coordinates
    )
    return changes.with_removed(np.array([1, 5]))
