"""Check the paired test against sums by hand, enumeration and chance, and users' gains against the metrics."""

from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.errors import InputError
from iisan_fast.evaluation import significance
from iisan_fast.evaluation.metrics import ranking_metrics, user_gains
from iisan_fast.evaluation.significance import paired_test

FEW = st.lists(st.integers(-9, 9), min_size=1, max_size=9)


def p_value(differences, **options):
    values = np.array(differences, dtype=np.float64)
    return paired_test(values, np.zeros_like(values), **options)


def enumerated(differences):
    """Compute the p-value of integers from its definition."""
    observed = abs(sum(differences))
    sums = [sum(signed) for signed in product(*[(difference, -difference) for difference in differences])]
    return sum(abs(total) >= observed for total in sums) / len(sums)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([5], 1),
        ([1, 1, 1], 2 / 8),
        ([1, 2, 3], 2 / 8),
        ([3, -1], 1),
        ([1, 1, 1, -1], 10 / 16),
        ([1, 0, 1, 0, 1], 2 / 8),  # users without a difference do not count
        ([0.1, 0.2, -0.3], 1),  # their sum in floating point is not 0
        ([0.1, 0.2, 0.3, -0.4], 14 / 16),
        ([1] * 12, 2 / 2**12),
    ],
)
def test_few_differences_by_hand(differences, expected):
    assert p_value(differences) == expected


@given(FEW)
def test_few_differences_by_definition_in_any_unit(differences):
    assert p_value(differences) == enumerated(differences) == p_value(0.1 * np.array(differences))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_neither_order_nor_direction_matters(differences):
    values = np.array(differences)
    zeros = np.zeros_like(values)
    assert paired_test(values, zeros, draws=100) == paired_test(zeros, values, draws=100)
    if len(values) <= significance.MOST_ENUMERATED:
        assert p_value(values[::-1]) == p_value(values)


@pytest.mark.parametrize("users", [1, 12, 13, 2000])
def test_identical_figures_give_one(users):
    figures = np.random.default_rng(0).random(users)
    assert paired_test(figures, figures) == 1


def test_draws_come_near_to_enumeration():
    differences = [3, -1, 4, 1, -5, 9, 2, 6, -5, 3, 5, 8, 9, -7]
    expected = enumerated(differences)
    assert p_value(differences) == pytest.approx(expected, abs=4 * (expected / 10_000) ** 0.5)


def test_a_difference_beyond_chance_gives_the_least_p_there_is():
    assert p_value(np.linspace(1, 2, 200), draws=999) == 1 / 1000


def test_the_seed_settles_the_draws(monkeypatch):
    differences = np.random.default_rng(0).normal(0.1, 1, 100)
    first = p_value(differences)
    assert p_value(differences) == first
    assert {p_value(differences, seed=seed) for seed in range(5)} != {first}
    monkeypatch.setattr(significance, "ELEMENTS_AT_ONCE", 700)  # seven draws at a time, and a last part of four
    assert p_value(differences) == pytest.approx(first, abs=0.03)


def test_memory_is_bounded_by_neither_users_nor_draws():
    differences = np.random.default_rng(0).normal(size=12_076)
    tracemalloc.start()
    p_value(differences)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_p_is_uniform_where_nothing_differs():
    trials, users = 400, 40
    both = np.random.default_rng(0).random((trials, 2, users))
    p_values = np.sort([paired_test(a, b, draws=499, seed=seed) for seed, (a, b) in enumerate(both)])
    distance = np.abs(p_values - np.linspace(0, 1, trials)).max()
    assert distance < 1.63 / trials**0.5  # Kolmogorov and Smirnov's bound, exceeded in one of a hundred such trials


@pytest.mark.parametrize("size", [0, 1, 13, 200])
def test_hits_in_draws_never_give_zero(size):
    assert 0 < p_value(np.ones(20), draws=size) <= 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros(3), np.zeros(4), r"found shapes \(3,\) and \(4,\)"),
        (np.zeros((3, 1)), np.zeros((3, 1)), "expected one figure a user"),
        (np.zeros(0), np.zeros(0), "expected at least one user"),
        (np.array([1, np.nan]), np.zeros(2), "expected finite figures"),
    ],
)
def test_figures_that_are_no_pairs(a, b, message):
    with pytest.raises(InputError, match=message):
        paired_test(a, b)


def test_gains_by_hand():
    gains = user_gains(np.array([1, 3, 1.5, 4, np.inf]), 3)
    assert gains["hr@3"].tolist() == [1, 1, 1, 0, 0]
    assert gains["ndcg@3"].tolist() == pytest.approx([1, 0.5, 0.7564707973660301, 0, 0])


@given(st.lists(st.integers(2, 100).map(lambda doubled: doubled / 2), min_size=1), st.integers(1, 50))
def test_metrics_are_the_means_of_gains(ranks, k):
    ranks = np.array(ranks)
    values = ranking_metrics(ranks, (k,))
    assert {name: values[name] for name in (f"hr@{k}", f"ndcg@{k}")} == {
        name: gain.mean() for name, gain in user_gains(ranks, k).items()
    }
