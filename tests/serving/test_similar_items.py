"""Similar items: the cosine of all pairs, without the item itself and removed items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import iisan_fast
from iisan_fast.errors import InputError
from iisan_fast.serving.similar_items import similar
from iisan_fast.serving.trained_model import TrainedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(run_with_terms) -> TrainedModel:
    return TrainedModel.load(run_with_terms, CPU)


def cosines(rows: torch.Tensor, item: int) -> np.ndarray:
    """Return the cosine of row `item` and each row, float64."""
    values = rows.double().numpy()
    return values @ values[item] / np.linalg.norm(values, axis=1) / np.linalg.norm(values[item])


@pytest.mark.parametrize("by", ["vectors", "content"])
def test_items_come_by_falling_cosine(model, by):
    catalogue = model.catalogue
    expected = cosines(catalogue.vectors if by == "vectors" else catalogue.coordinates, 6)
    order = [row for row in np.argsort(-expected) if row != 6][:12]
    items = similar(model, catalogue.item_ids[6], 12, by)
    assert [item.item_id for item in items] == [catalogue.item_ids[row] for row in order]
    assert [item.title for item in items] == [f"title of {item.item_id}" for item in items]
    np.testing.assert_allclose([item.score for item in items], expected[order], rtol=1e-5)


def test_removed_items_are_left_out_but_may_be_asked_for(model):
    first, second, third = similar(model, "i4", 3)
    is_removed = np.zeros(len(model.catalogue.item_ids), dtype=bool)
    is_removed[[model.catalogue.numbers[first.item_id] - 1, 3]] = True
    smaller = model.with_catalogue(replace(model.catalogue, is_removed=is_removed))
    assert similar(smaller, "i4", 2) == [second, third]


def test_equal_items_come_by_number_and_all_others_at_most(model):
    vectors = model.catalogue.vectors.clone()
    vectors[[20, 90, 140]] = 2 * vectors[5]
    items = similar(model.with_catalogue(replace(model.catalogue, vectors=vectors)), model.catalogue.item_ids[5], 149)
    assert [model.catalogue.numbers[item.item_id] - 1 for item in items[:3]] == [20, 90, 140] and len(items) == 148


def test_mistakes_are_refused(model, neighbours_run, tmp_path, shop):
    for arguments, message in (
        (("gone", 3), r"item_id: expected ids of the run's 149 items, found 1 unknown \(gone\)"),
        (("i4", 0), "k: expected a number from 1 to 149"),
        (("i4", 150), "k: expected a number from 1 to 149"),
        (("i4", 3, "title"), "by: expected one of vectors, content, found 'title'"),
    ):
        with pytest.raises(InputError, match=message):
            similar(model, *arguments)
    iisan_fast.train(shop[0], method="neighbours", out=tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="content compares the states of a cache, and this run has none"):
        similar(TrainedModel.load(tmp_path / "run", CPU), "i4", 3, "content")


def test_states_that_are_all_equal_are_refused(model):
    nothing = model.with_catalogue(replace(model.catalogue, coordinates=torch.empty(149, 0)))
    with pytest.raises(InputError, match="the states of all items are equal"):
        similar(nothing, "i4", by="content")
