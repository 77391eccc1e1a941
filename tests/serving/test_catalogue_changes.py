"""The changes of a catalogue since the training, as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from iisan_fast.errors import InputError
from iisan_fast.serving.growing.catalogue import Catalogue
from iisan_fast.serving.growing.catalogue_changes import CatalogueChanges, TrainedBase

FILE = Path("run/catalogue.safetensors")


def trained() -> Catalogue:
    """Return a catalogue of three items."""
    return Catalogue(
        item_ids=["a", "b", "c"],
        titles=["A", "B", "C"],
        training_counts=np.array([0, 5, 0, 2]),
        trained=3,
        is_removed=np.zeros(3, dtype=bool),
        vectors=torch.tensor([[1.0, 0], [2, 0], [3, 0]]),
        coordinates=torch.tensor([[1.0], [2], [3]]),
    )


def no_changes() -> CatalogueChanges:
    return CatalogueChanges.none(TrainedBase.of(4, trained().vectors), width=2, dims=1)


def with_items(changes: CatalogueChanges, items: dict[int, tuple[str, float]]) -> CatalogueChanges:
    """Return changes with items, {number: (id, value)}; the value stands in the title, vector and coordinate."""
    numbers = np.array(list(items), dtype=np.int64)
    ids, values = zip(*items.values())
    column = torch.tensor(values)[:, None]
    return changes.with_items(numbers, ids, [f"{value:g}" for value in values], column.repeat(1, 2), column)


def test_no_changes_leave_a_catalogue_as_it_is():
    catalogue = no_changes().applied_to(trained())
    assert catalogue.item_ids == ["a", "b", "c"] and catalogue.available == 3
    assert torch.equal(catalogue.vectors, trained().vectors)
    assert torch.equal(catalogue.coordinates, trained().coordinates)


def test_items_are_added_behind_the_trained_ones_and_replace_contents():
    changes = with_items(no_changes(), {5: ("e", 50), 2: ("b", 20), 4: ("d", 40)})
    catalogue = changes.applied_to(trained())
    assert changes.added == 2
    assert catalogue.item_ids == ["a", "b", "c", "d", "e"]
    assert catalogue.titles == ["A", "20", "C", "40", "50"]
    assert catalogue.training_counts.tolist() == [0, 5, 0, 2, 0, 0]
    assert catalogue.vectors.tolist() == [[1, 0], [20, 20], [3, 0], [40, 40], [50, 50]]
    assert catalogue.coordinates.flatten().tolist() == [1, 20, 3, 40, 50]
    assert catalogue.trained == 3 and catalogue.available == 5


def test_the_last_contents_of_an_item_count():
    changes = with_items(with_items(no_changes(), {4: ("d", 40), 1: ("a", 10)}), {4: ("d", 41), 5: ("e", 50)})
    assert changes.numbers.tolist() == [1, 4, 5] and changes.item_ids == ["a", "d", "e"]
    assert changes.titles == ["10", "41", "50"]
    assert changes.vectors[:, 0].tolist() == [10, 41, 50]
    assert changes.coordinates.flatten().tolist() == [10, 41, 50]


def test_removed_items_keep_their_numbers_and_return():
    changes = with_items(no_changes(), {4: ("d", 40)}).with_removed(np.array([4, 1])).with_removed(np.array([1]))
    catalogue = changes.applied_to(trained())
    assert changes.removed.tolist() == [1, 4]
    assert catalogue.is_removed.tolist() == [True, False, False, True] and catalogue.available == 2
    assert catalogue.numbers["d"] == 4 and not catalogue.has("d") and catalogue.has("b") and not catalogue.has("x")
    assert changes.with_returned(np.array([4])).removed.tolist() == [1]


def test_a_run_without_titles_or_coordinates_has_none_after_changes():
    catalogue = Catalogue(["a"], None, np.array([0, 1]), 1, np.zeros(1, dtype=bool), torch.ones(1, 2), None)
    base = TrainedBase.of(1, catalogue.vectors)
    changes = CatalogueChanges.none(base, 2, None).with_items(np.array([2]), ["b"], ["B"], torch.zeros(1, 2), None)
    changed = changes.applied_to(catalogue)
    assert changed.titles is None and changed.coordinates is None and changed.item_ids == ["a", "b"]


def test_changes_of_other_weights_are_refused():
    changes = with_items(no_changes(), {4: ("d", 40)})
    other = TrainedBase.of(6, trained().vectors + 1)
    with pytest.raises(
        InputError, match=r"trained on since .*best epoch 4 there, 6 now.*update-items run ITEMS.* or re"
    ):
        changes.refuse_other_weights(other, FILE)
    with pytest.raises(InputError, match="of a run with 3 items, and this run has 2; remove"):
        changes.refuse_other_weights(TrainedBase.of(4, trained().vectors[:2]), FILE)
    changes.refuse_other_weights(TrainedBase.of(4, trained().vectors), FILE)
    assert changes.is_outdated(other) and not changes.with_base(other).is_outdated(other)


def test_removals_alone_stay_valid_with_other_weights():
    changes = no_changes().with_removed(np.array([2]))
    changes.refuse_other_weights(TrainedBase.of(6, trained().vectors + 1), FILE)
