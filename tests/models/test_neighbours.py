"""Both terms added to a model's scores, beside the formula on dense arrays; the baseline; the tensors of a file."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.datasets import histories_at_random, make_sequences
from helpers.tables import random_table
from iisan_fast.models.cooccurrence import CoOccurrence
from iisan_fast.models.neighbours import NeighbourTerms, Scores, popularity_scores
from iisan_fast.models.similarity import Similarity

ITEMS, USERS = 30, 70
SEQUENCES = make_sequences(histories_at_random(USERS, ITEMS), items=ITEMS)
HISTORIES = SEQUENCES.split("validation").history


@pytest.fixture(scope="module")
def terms() -> NeighbourTerms:
    source = random_table([(2, 12), (2, 8)], ITEMS, torch.float32)
    return NeighbourTerms(CoOccurrence.of(SEQUENCES, 9), Similarity.of(source, 6))


def model(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return random queries and vectors of 5 dimensions."""
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(rows, 5, generator=generator, dtype=dtype) for rows in (USERS, ITEMS))


def dense(scores: Scores, rows: np.ndarray) -> Tensor:
    """Return the scores of some users for all items, float64."""
    full = scores.queries[rows].double() @ scores.vectors.double().T
    if scores.added is not None:
        offsets, items, values = scores.added(rows)
        assert offsets.dtype == items.dtype == torch.int64
        assert values.dtype == scores.queries.dtype and offsets[-1] == len(items) == len(values)
        for row, (start, end) in enumerate(zip(offsets, offsets[1:])):
            assert (items[start:end].diff() > 0).all()
            full[row, items[start:end]] += values[start:end].double()
    return full


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cooccurrence", "similarity"), [(2.0, 6.0), (0.5, 0.0), (0.0, 3.0)])
def test_scores_follow_their_formula(terms, dtype, cooccurrence, similarity):
    queries, vectors = model(dtype)
    rows = np.array([3, 0, 69, 3])
    scores = terms.scored(queries, vectors, HISTORIES, cooccurrence, similarity)
    assert (scores.added is None) == (cooccurrence == 0)
    assert scores.queries.shape[1] == scores.vectors.shape[1] == (5 + 6 if similarity else 5)
    x = terms.similarity.vectors.double()
    matrix = np.zeros((ITEMS, ITEMS))
    for item in range(ITEMS):
        entries = slice(*terms.cooccurrence.offsets[item : item + 2])
        matrix[item, terms.cooccurrence.items[entries]] = terms.cooccurrence.values[entries]
    expected = queries[rows].double() @ vectors.double().T
    for row, user in enumerate(rows):
        history = [item - 1 for item in HISTORIES[user] if item][::-1]
        sums = sum(0.7**age * matrix[item] for age, item in enumerate(history))
        profile = sum(weight * x[item] for weight, item in zip((1, 0.7, 0.49), history))
        expected[row] += cooccurrence * torch.from_numpy(np.log(1 + 20 * sums))
        expected[row] += similarity * (x @ (profile / profile.norm()))
    torch.testing.assert_close(dense(scores, rows), expected, rtol=1e-5, atol=1e-5)


def test_without_weights_the_models_tensors_are_returned(terms):
    queries, vectors = model()
    scores = terms.scored(queries, vectors, HISTORIES, 0.0, 0.0)
    assert scores.queries is queries and scores.vectors is vectors and scores.added is None


def test_similarity_without_states_is_refused(terms):
    with pytest.raises(ValueError, match="expected 0 without states, found 3"):
        replace(terms, similarity=None).scored(*model(), HISTORIES, 2.0, 3.0)


def test_popularity_scores_are_logs_of_training_counts():
    queries, vectors = popularity_scores(np.array([9, 0, 1, 8]), 3, torch.device("cpu"))
    expected = torch.tensor([0.3 * math.log(count) for count in (0.5, 1, 8)])
    assert torch.equal(queries, torch.ones(3, 1)) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors[:, 0], expected)


@pytest.mark.parametrize("with_states", [True, False])
def test_the_baseline_is_popularity_with_the_terms_at_their_defaults(terms, with_states):
    terms = terms if with_states else replace(terms, similarity=None)
    counts = SEQUENCES.training_counts
    rows = np.arange(USERS)
    popularity = np.tile(0.3 * np.log(np.maximum(counts[1:], 0.5)), (USERS, 1))
    zeros = torch.zeros(USERS, 1, dtype=torch.float64), torch.zeros(ITEMS, 1, dtype=torch.float64)
    both = dense(terms.scored(*zeros, HISTORIES, 2.0, 9.0 if with_states else 0.0), rows)
    baseline = dense(terms.baseline(counts, HISTORIES, torch.device("cpu")), rows)
    torch.testing.assert_close(baseline, torch.from_numpy(popularity) + both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", range(1, 70))
def test_equal_sums_have_equal_values_wherever_they_stand(size):
    """The logarithm may not depend on an entry's place in the array, or equal items would not be tied."""
    value = np.float32(0.037)
    columns = np.arange(size)
    matrix = CoOccurrence(np.array([0, size] + [size] * size), (columns + 1).astype(np.int32), np.full(size, value))
    zeros = torch.zeros(1, 1), torch.zeros(size + 1, 1)
    added = NeighbourTerms(matrix, None).scored(*zeros, np.array([[1]]), 2.0, 0.0).added(np.array([0]))
    assert len(added.values) == size and (added.values == added.values[0]).all()


@pytest.mark.parametrize("with_states", [True, False])
def test_the_tensors_of_a_file_give_the_same_terms(terms, with_states):
    terms = terms if with_states else replace(terms, similarity=None)
    tensors = terms.tensors()
    again = NeighbourTerms.of_tensors(tensors)
    assert (again.similarity is not None) == with_states
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in tensors.items())
    rows = np.arange(USERS)
    weights = (2.0, 6.0 if with_states else 0.0)
    before, after = (dense(either.scored(*model(), HISTORIES, *weights), rows) for either in (terms, again))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cooccurrence.offsets", lambda tensor: tensor.flip(0), "offsets: expected to end with"),
        ("cooccurrence.offsets", lambda tensor: tensor[:0], "offsets: expected to end with"),
        ("cooccurrence.offsets", lambda tensor: tensor[[0, 2, 1, *range(3, ITEMS + 1)]], "expected ascending numbers"),
        ("cooccurrence.items", lambda tensor: tensor + 1, "expected columns below 30"),
        ("cooccurrence.items", lambda tensor: tensor - 1, "expected columns below 30"),
        ("cooccurrence.items", lambda tensor: tensor.long(), "items: expected torch.int32"),
        ("cooccurrence.values", lambda tensor: tensor[:-1], "offsets: expected to end with"),
        ("similarity.basis", lambda tensor: tensor[:, :-1], "vectors: expected float32"),
        ("similarity.vectors", lambda tensor: tensor[:-1], "vectors: expected 30 items, found 29"),
        ("similarity.basis", lambda tensor: tensor[0], "basis: expected two dimensions"),
        ("similarity.mean", lambda tensor: tensor.double(), "mean: expected float32"),
        ("similarity.scale", lambda tensor: None, "expected tensors"),
        ("another", lambda tensor: torch.zeros(1), "expected tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(terms, name, change, message):
    tensors = terms.tensors()
    changed = change(tensors.get(name))
    damaged = {key: tensor for key, tensor in tensors.items() if key != name}
    if changed is not None:
        damaged[name] = changed
    with pytest.raises(ValueError, match=message):
        NeighbourTerms.of_tensors(damaged)
