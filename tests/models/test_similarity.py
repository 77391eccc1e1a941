"""Coordinates of items: whitened components by a plain eigendecomposition, and equal bits for equal states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast.errors import InputError
from iisan_fast.models.similarity import Similarity
from iisan_fast.states.feature_table import FeatureTable, PinnedTable, load_table

CPU = torch.device("cpu")
ALL = 10_000  # dims: no component is cut


def final(table: FeatureTable) -> list[Tensor]:
    """Return the final states of a table's items, [items, D] of each view."""
    return [view[1:, -1] for view in table.views]


def of_states(*views: Tensor, dims: int = ALL) -> Similarity:
    """Return the similarity of items with these final states, [items, D] of each view."""
    return Similarity.of(FeatureTable(tuple(torch.cat([view[:1] * 0, view])[:, None] for view in views)), dims)


def by_formula(states: Sequence[Tensor], dims: int) -> np.ndarray:
    """Return the coordinates of all items from their definition, float64 [items, dims], without a rule for signs."""
    joined = []
    for view in states:
        centred = view.double().numpy() - view.double().numpy().mean(axis=0)
        joined.append(centred / np.sqrt((centred**2).sum(axis=1).mean()))
    rows = np.concatenate(joined, axis=1)
    _, lengths, directions = np.linalg.svd(rows, full_matrices=False)  # not the covariance
    coordinates = rows @ (directions / lengths[:, None]).T[:, :dims]
    return coordinates / np.linalg.norm(coordinates, axis=1, keepdims=True)


def assert_same_bits(left: Similarity, right: Similarity) -> None:
    for name in ("vectors", "mean", "scale", "basis"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("dims", [3, 13])
def test_coordinates_are_whitened_components_of_length_one(dims):
    """Two views of unlike scale and correlated dimensions; signs are fixed by the basis's largest entries."""
    table = random_table([(2, 9), (3, 8)], 60, torch.float32)
    states = final(table)
    states[1].mul_(100)
    states[0].copy_(states[0] @ torch.randn(9, 9, generator=torch.Generator().manual_seed(1)) + 5)
    similarity = Similarity.of(table, dims)
    expected = by_formula(states, dims)
    signs = np.sign((expected * similarity.vectors.numpy()).sum(axis=0))
    np.testing.assert_allclose(similarity.vectors.numpy(), expected * signs, atol=2e-5)
    largest = similarity.basis.abs().argmax(dim=0)
    assert (similarity.basis[largest, torch.arange(dims)] > 0).all()
    np.testing.assert_allclose(similarity.vectors.norm(dim=1), 1, rtol=1e-6)


def test_a_view_counts_the_same_at_any_scale():
    table = random_table([(1, 6), (1, 4)], 50, torch.float32)
    before = Similarity.of(table, 5).vectors
    final(table)[1].mul_(64)  # a power of two: no other rounding
    np.testing.assert_allclose(Similarity.of(table, 5).vectors, before, atol=1e-5)


def test_every_placement_and_size_of_parts_gives_the_same_map(tmp_path, monkeypatch):
    table = random_table([(2, 24), (2, 16)], 90, torch.float32)
    item_ids = [f"i{number}" for number in range(1, 91)]
    cache = fill_store(tmp_path / "cache", item_ids, table, ("image", "title"))
    mapped = load_table(cache, ("image", "title"), item_ids, CPU, "mapped")
    expected = Similarity.of(table, 12)
    try:
        for source in (PinnedTable(table.views, CPU), mapped):
            assert_same_bits(Similarity.of(source, 12), expected)
    finally:
        mapped.close()
    monkeypatch.setattr(FeatureTable, "items_at_once", 7)
    parts = Similarity.of(table, 12)
    np.testing.assert_allclose(parts.vectors, expected.vectors, atol=1e-5)  # the covariance is a sum of other parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_states_have_equal_coordinates_wherever_they_stand(dtype, threads_given_back):
    states = torch.randn(300, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = [0, 1, 17, 63, 64, 128, 255, 299]
    states[places] = states[5].clone()
    similarity = of_states(states, dims=20)
    assert (similarity.vectors[places] == similarity.vectors[5]).all()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(similarity.project([states]), similarity.vectors)
        for row in (0, 150, 299):
            assert torch.equal(similarity.project([states[row : row + 1]])[0], similarity.vectors[row])
        assert torch.equal(similarity.project([states[3:50]]), similarity.vectors[3:50])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_bits_of_a_cpu():
    states = torch.randn(500, 96, generator=torch.Generator().manual_seed(0))
    similarity = of_states(states, dims=40)
    assert torch.equal(similarity.project([states.cuda()]).cpu(), similarity.vectors)


def test_components_without_variance_are_dropped():
    states = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(3, 8).tril()
    similarity = of_states(states, states * 2, dims=16)
    assert similarity.vectors.shape == (40, 3)
    few = of_states(torch.eye(4)[:3], dims=4)
    assert few.vectors.shape == (3, 2)  # three items span two directions around their mean


@pytest.mark.parametrize("items", [1, 5])
def test_items_without_difference_have_no_coordinates(items):
    similarity = of_states(torch.full((items, 6), 0.1), dims=4)
    assert similarity.vectors.shape == (items, 0)
    assert similarity.profiles(np.array([[1, 1]])).shape == (1, 0)
    assert similarity.project([torch.zeros(2, 6)]).shape == (2, 0)


def test_an_item_at_the_mean_stays_zero():
    states = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2], [0, 0]])
    similarity = of_states(states)
    assert not similarity.vectors[4].any()
    np.testing.assert_allclose(similarity.vectors[:4].norm(dim=1), 1, rtol=1e-6)
    assert not similarity.profiles(np.array([[5, 5]])).any()


def test_profiles_are_sums_of_the_last_three_items():
    similarity = of_states(torch.randn(9, 6, generator=torch.Generator().manual_seed(2)), dims=4)
    histories = np.array([[1, 2, 3, 4, 5], [0, 0, 0, 7, 7], [0, 0, 0, 0, 9], [0, 0, 0, 0, 0]])
    x = similarity.vectors.double().numpy()
    expected = np.stack([x[4] + 0.7 * x[3] + 0.49 * x[2], x[6] + 0.7 * x[6], x[8], 0 * x[0]])
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    profiles = similarity.profiles(histories)
    assert profiles.dtype == torch.float32
    np.testing.assert_allclose(profiles, expected / np.maximum(lengths, 1e-9), atol=1e-6)
    assert torch.equal(similarity.profiles(histories[:, -3:]), profiles)
    assert torch.equal(similarity.profiles(histories[1:3, -2:]), profiles[1:3])


def test_a_state_that_is_not_finite_is_named():
    states = torch.randn(8, 4)
    states[5, 2] = torch.inf
    with pytest.raises(InputError, match="item number 6 has a state that is not finite"):
        of_states(states)


def test_states_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="expected widths that sum to 4, found 5"):
        of_states(torch.randn(8, 4)).project([torch.randn(2, 5)])
