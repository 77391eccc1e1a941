"""Items that join the catalogue of a trained run get what they would have had in a catalogue with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.growing_runs import CPU, NEW, TRAINED, trained_run, whole_catalogue, write_growing_data
from iisan_fast.serving.growing.changing_catalogue import add_items, update_items
from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.recommendation import recommend
from iisan_fast.serving.trained_model import TrainedModel

ALL = TRAINED + NEW
ALL_LAYERS = tuple(range(7))
EVERYTHING = {
    "model.method": "iisan-versa",
    "model.layer_groups": 3,
    "model.standardise": True,
    "model.item_ids": True,
    "train.learning_rates": {"item_embeddings": 0.1},
    "scoring.similarity": 1.0,
    "scoring.cold_bias": -1.0,
    "scoring.similarity_dims": 16,
}
RUNS = {  # views, and settings
    "two views with everything": (("image", "title"), EVERYTHING),
    "titles alone": (("title",), {"model.method": "iisan"}),
    "a tuned encoder": (("title",), {"model.method": "bitfit", "uncached": True}),
    "encoders that run": (("title",), {"model.method": "frozen", "uncached": True, "uncached.dtype": "float32"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_growing_data(tmp_path_factory.mktemp("data"))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two matrices are equal within 1e-5 of the largest magnitude."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", RUNS)
def test_added_items_are_as_in_a_catalogue_with_them(data, tmp_path, name):
    sources, settings = RUNS[name]
    views = data.views(*sources, layers=ALL_LAYERS if settings is EVERYTHING else None)
    run = trained_run(data, tmp_path, views, **settings)
    vectors, coordinates = whole_catalogue(data, run, tmp_path, views)
    items = tmp_path / "new.tsv"
    items.write_text(data.lines(*data.new_ids()))
    images = data.whole / "images" if "image" in sources else None

    changed = add_items(run, items, images, device=CPU)
    loaded = TrainedModel.load(run, CPU)

    assert (changed.added, changed.updated, changed.removed, changed.items) == (NEW, 0, 0, ALL)
    for model in (changed.model, loaded):
        catalogue = model.catalogue
        assert catalogue.item_ids == [f"i{number}" for number in range(1, ALL + 1)]
        assert catalogue.trained == TRAINED and catalogue.available == ALL
        assert not catalogue.training_counts[TRAINED + 1 :].any()
        assert_close(catalogue.vectors, vectors)
        assert torch.equal(catalogue.vectors[:TRAINED], TrainedModel.load(run, CPU, changed=False).catalogue.vectors)
        if coordinates.numel():
            assert_close(catalogue.coordinates, coordinates)
    titles = [line.split("\t")[1] for line in data.lines(*data.new_ids()).splitlines()]
    assert loaded.catalogue.titles[TRAINED:] == titles
    assert_recommended(loaded)


def assert_recommended(model: TrainedModel) -> None:
    """Assert that all new items are ranked, also for a history of a new item, by the dense scores."""
    histories = UserHistories(["old", "new"], np.array([0, 2, 3]), np.array([1, 2, ALL]))
    (ranked,) = recommend(model, histories, ALL, exclude_history=False)
    assert all(set(row) == set(range(1, ALL + 1)) for row in ranked.items.tolist())
    scores = model.scores(histories)
    dense = scores.queries @ scores.vectors.T
    order = torch.from_numpy(ranked.items - 1)
    new = order >= TRAINED
    assert_close(torch.from_numpy(ranked.scores)[new], dense.gather(1, order)[new])


def test_an_updated_item_keeps_its_trained_vector(data, tmp_path):
    views = data.views("title", layers=ALL_LAYERS)
    run = trained_run(data, tmp_path, views, **{**EVERYTHING, "scoring.similarity": 0.0})
    before = TrainedModel.load(run, CPU).catalogue
    number = int(before.training_counts[1:].argmax()) + 1
    other = number % TRAINED + 1
    texts = {n: data.lines(f"i{n}").split("\t")[1] for n in (number, other)}

    (tmp_path / "same.tsv").write_text(data.lines(f"i{number}"))
    same = update_items(run, tmp_path / "same.tsv", device=CPU).model.catalogue
    assert_close(same.vectors, before.vectors)
    assert_close(same.coordinates, before.coordinates)

    (tmp_path / "other.tsv").write_text(f"i{number}\t{texts[other]}")
    changed = update_items(run, tmp_path / "other.tsv", device=CPU)
    catalogue = changed.model.catalogue
    assert (changed.added, changed.updated, changed.items) == (0, 1, TRAINED)
    assert catalogue.titles[number - 1] == texts[other].strip()
    assert_close(catalogue.coordinates[number - 1], before.coordinates[other - 1])
    model = changed.model
    trained = torch.from_numpy(before.training_counts > 0)
    weight = _item_id_weight(model)
    rows = (trained.cumsum(0) * trained)[[number, other]]
    expected = before.vectors[other - 1] - weight[rows[1]] + weight[rows[0]]
    assert_close(catalogue.vectors[number - 1], expected)
    others = torch.arange(TRAINED) != number - 1
    assert torch.equal(catalogue.vectors[others], before.vectors[others])


def _item_id_weight(model: TrainedModel) -> torch.Tensor:
    from iisan_fast.training.run_folder import RunFolder

    return RunFolder.open(model.run).load_best()[0]["model.item_ids.weight"]
