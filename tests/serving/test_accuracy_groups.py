"""Check groups of users: each user once, similar sizes, known intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from iisan_fast.evaluation import user_gains
from iisan_fast.serving.report.accuracy_groups import MOST_GROUPS, accuracy_groups, group_bounds, mean, proportion


@pytest.mark.parametrize("zero_apart", [True, False])
@pytest.mark.parametrize("highest", [1, 4, 9, 300])
@pytest.mark.parametrize("users", [1, 2, 37, 2000])
def test_each_user_is_in_one_group(users, highest, zero_apart):
    numbers = np.random.default_rng(0).geometric(0.3, users) * highest // 4
    bounds = group_bounds(numbers, zero_apart)
    assert 1 <= len(bounds) <= MOST_GROUPS and bounds == sorted(bounds)
    members = [((numbers >= first) & (numbers <= last)).sum() for first, last in bounds]
    assert sum(members) == users and min(members) > 0
    if zero_apart and (numbers == 0).any():
        assert bounds[0] == (0, 0)


def test_groups_of_many_different_numbers_are_of_similar_size():
    sizes = [last - first + 1 for first, last in group_bounds(np.arange(1, 601), False)]
    assert sizes == [100] * MOST_GROUPS


def test_few_different_numbers_have_a_group_each():
    assert group_bounds(np.array([8, 4, 4, 6, 6, 6]), False) == [(4, 4), (6, 6), (8, 8)]


def test_groups_average_to_the_whole():
    generator = np.random.default_rng(1)
    ranks = generator.integers(1, 40, 500).astype(float)
    gains = user_gains(ranks, 10)
    groups = accuracy_groups(generator.integers(0, 90, 500), gains, 10, zero_apart=True)
    users = [group.users for group in groups]
    assert np.average([group.hr.value for group in groups], weights=users) == pytest.approx(gains["hr@10"].mean())
    assert np.average([group.ndcg.value for group in groups], weights=users) == pytest.approx(gains["ndcg@10"].mean())
    assert groups[-1].label.endswith(" or more") and "–" in groups[-2].label


@pytest.mark.parametrize(("hits", "users"), [(0, 10), (3, 10), (55, 1600), (7, 7)])
def test_the_interval_of_a_proportion_is_wilsons(hits, users):
    estimate = proportion(np.repeat([1.0, 0.0], [hits, users - hits]))
    expected = binomtest(hits, users).proportion_ci(0.95, "wilson")
    assert estimate == pytest.approx((hits / users, expected.low, expected.high), abs=1e-6)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    estimate = mean(np.array([0.0, 0.2, 0.4, 0.6]))
    half = 1.959964 * np.std([0, 0.2, 0.4, 0.6], ddof=1) / 2
    assert estimate == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert mean(np.array([0.0, 1.0])).low == 0.0


def test_one_user_has_no_interval():
    assert proportion(np.ones(1)) == mean(np.ones(1)) == (1.0, None, None)
