"""A loaded run scores its catalogue as its test did, and holds vectors and coordinates once."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from iisan_fast.data.sequences import Split
from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.item_matrix import ItemMatrix
from iisan_fast.serving.trained_model import TrainedModel
from iisan_fast.training import TermWeights, load, run_terms

CPU = torch.device("cpu")
RUNS = ("plain_run", "run_with_terms", "neighbours_run")


def histories_before(split: Split) -> UserHistories:
    """Return the histories of a split's users, all interactions before the target."""
    parts = [split.items[end - length : end] for end, length in zip(split.ends, split.lengths)]
    offsets = np.concatenate([[0], np.cumsum(split.lengths)])
    return UserHistories([str(user) for user in split.users], offsets, np.concatenate(parts))


@pytest.mark.parametrize("name", RUNS)
def test_scores_are_those_of_the_run_bit_for_bit(name, request):
    run = request.getfixturevalue(name)
    best = load(run, CPU)
    expected = best.scores("test")
    scores = TrainedModel.load(run, CPU).scores(histories_before(best.sequences.split("test")))
    assert torch.equal(scores.queries, expected.queries) and torch.equal(scores.vectors, expected.vectors)
    assert (scores.added is None) == (expected.added is None) == (name == "plain_run")
    if scores.added is not None and expected.added is not None:
        rows = np.arange(len(scores.queries))
        assert all(map(torch.equal, scores.added(rows), expected.added(rows)))


def test_vectors_and_coordinates_are_views_of_one_matrix(run_with_terms):
    model = TrainedModel.load(run_with_terms, CPU)
    best = load(run_with_terms, CPU)
    memory = model.joined.untyped_storage().data_ptr()
    assert torch.equal(model.catalogue.vectors, best.item_vectors)
    assert torch.equal(model.catalogue.coordinates, best.terms.similarity.vectors)
    for part in (model.catalogue.vectors, model.catalogue.coordinates, model.encoder.item_vectors):
        assert part.untyped_storage().data_ptr() == memory
    assert model.encoder.terms.similarity is None and model.similarity.vectors is model.catalogue.coordinates


@pytest.mark.parametrize("bias", [0.0, -0.5])
@pytest.mark.parametrize("weight", [0.0, 6.0])
@pytest.mark.parametrize("dims", [None, 1, 3])
def test_a_joined_matrix_has_the_columns_that_weights_ask_for(bias, weight, dims):
    vectors = torch.randn(5, 2)
    coordinates = None if dims is None else torch.randn(5, dims)
    counts = np.array([0, 3, 0, 1, 0, 2])
    matrix = ItemMatrix.of(vectors, coordinates, counts, TermWeights(1.0, weight, bias))
    columns = [vectors]
    columns += [torch.tensor([[0.0], [1], [0], [1], [0]])] if bias else []
    columns += [coordinates] if weight and coordinates is not None else []
    assert torch.equal(matrix.joined, torch.cat(columns, dim=1)) and torch.equal(matrix.vectors, vectors)
    assert matrix.coordinates is None if dims is None else torch.equal(matrix.coordinates, coordinates)


def test_a_model_with_more_items_scores_the_trained_ones_as_before(run_with_terms):
    model = TrainedModel.load(run_with_terms, CPU)
    before = model.catalogue
    histories = UserHistories(["a", "b"], np.array([0, 2, 5]), np.array([1, 2, 7, 1, 149]))
    grown = replace(
        before,
        item_ids=[*before.item_ids, "new"],
        titles=None,
        training_counts=np.append(before.training_counts, 0),
        is_removed=np.append(before.is_removed, False),
        vectors=torch.cat([before.vectors, before.vectors[4:5]]),
        coordinates=torch.cat([before.coordinates, before.coordinates[4:5]]),
    )
    scores = model.scores(histories)
    others = model.with_catalogue(grown).scores(histories)
    assert torch.equal(others.queries, scores.queries) and torch.equal(others.vectors[:-1], scores.vectors)
    assert torch.equal(others.vectors[-1, :16], before.vectors[4]) and others.vectors[-1, 16] == 1
    assert torch.equal(others.vectors[-1, 17:], before.coordinates[4])
    assert all(map(torch.equal, others.added(np.arange(2)), scores.added(np.arange(2))))


def test_a_catalogue_with_removed_items_is_not_copied(plain_run):
    model = TrainedModel.load(plain_run, CPU)
    removed = replace(model.catalogue, is_removed=~model.catalogue.is_removed)
    assert model.with_catalogue(removed).joined is model.joined


def test_coordinates_are_read_in_parts(run_with_terms, monkeypatch):
    monkeypatch.setattr(run_terms, "ITEMS_AT_ONCE", 40)
    expected = load(run_with_terms, CPU).terms.similarity.vectors
    assert torch.equal(TrainedModel.load(run_with_terms, CPU).catalogue.coordinates, expected)


def test_coordinates_of_a_run_without_their_file_are_those_that_were_built(run_with_terms, tmp_path):
    run = shutil.copytree(run_with_terms, tmp_path / "run")
    for name in ("neighbours.safetensors", "checksums.json"):  # as a run of an earlier version
        (run / name).unlink()
    expected = TrainedModel.load(run_with_terms, CPU).catalogue.coordinates
    assert torch.equal(TrainedModel.load(run, CPU).catalogue.coordinates, expected)
