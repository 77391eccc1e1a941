"""The rank of a target against counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iisan_fast import kernels


def naive_scores(scores: list[list[int]], added: list[dict[int, int]]) -> list[list[int]]:
    return [[score + more.get(item, 0) for item, score in enumerate(row)] for row, more in zip(scores, added)]


def added_scores(added: list[dict[int, int]]) -> kernels.AddedScores:
    """Return the entries (item -> what is added) of each user."""
    offsets = [0, *itertools.accumulate(map(len, added))]
    entries = [entry for of_user in added for entry in sorted(of_user.items())]
    items, values = zip(*entries) if entries else ((), ())
    return kernels.AddedScores(
        torch.tensor(offsets), torch.tensor(items, dtype=torch.int64), torch.tensor(values, dtype=torch.float64)
    )


def naive_rank(scores: list[float], target: int, excluded: set[int], tie_share: float) -> float:
    if target in excluded:
        return float("inf")
    others = [score for item, score in enumerate(scores) if item not in excluded and item != target]
    return 1 + sum(s > scores[target] for s in others) + sum(s == scores[target] for s in others) * tie_share


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_target_rank_equals_counting(data):
    users, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    scores = data.draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=count, max_size=count), min_size=users, max_size=users)
    )
    targets = data.draw(st.lists(st.integers(0, count - 1), min_size=users, max_size=users))
    width = data.draw(st.integers(0, 5))
    excluded = data.draw(
        st.lists(st.lists(st.integers(-1, count - 1), min_size=width, max_size=width), min_size=users, max_size=users)
    )
    tie_share = data.draw(st.sampled_from([0.5, 0.0]))
    entries = st.dictionaries(st.integers(0, count - 1), st.integers(-3, 3))
    added = data.draw(st.none() | st.lists(entries, min_size=users, max_size=users))
    masked, unmasked = kernels.target_rank(
        torch.tensor(scores, dtype=torch.float64),
        torch.eye(count, dtype=torch.float64),
        torch.tensor(targets),
        torch.tensor(excluded, dtype=torch.int64).reshape(users, width),
        tie_share=tie_share,
        chunk_elements=data.draw(st.integers(1, 40)),
        form=data.draw(st.sampled_from(["reference", "cpu"])),
        added=None if added is None else added_scores(added),
    )
    if added is not None:
        scores = naive_scores(scores, added)
    expected = [naive_rank(s, t, set(x) - {-1}, tie_share) for s, t, x in zip(scores, targets, excluded)]
    assert masked.tolist() == expected
    assert unmasked.tolist() == [naive_rank(s, t, set(), tie_share) for s, t in zip(scores, targets)]


def test_target_rank_of_a_score_that_is_not_finite_is_nan():
    items = torch.tensor([[1.0], [float("nan")], [2.0]])
    ranks = kernels.target_rank(torch.ones(1, 1), items, torch.tensor([0]), torch.full((1, 1), -1))
    assert all(rank.isnan().all() for rank in ranks)


@pytest.mark.parametrize("form", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_an_added_score_that_is_not_finite_breaks_only_its_users_rank(form, value):
    queries = torch.ones(3, 1, dtype=torch.float64)
    items = torch.arange(5.0, dtype=torch.float64)[:, None]
    added = kernels.AddedScores(
        torch.tensor([0, 1, 2, 2]), torch.tensor([4, 0]), torch.tensor([value, 9], dtype=torch.float64)
    )
    excluded = torch.full((3, 1), -1)
    for rank in kernels.target_rank(queries, items, torch.tensor([2, 2, 2]), excluded, form=form, added=added):
        assert rank.isnan().tolist() == [True, False, False] and rank[1:].tolist() == [4, 3]


@pytest.mark.parametrize("form", ["reference", "cpu"])
@pytest.mark.parametrize(("dtype", "large", "small"), [(torch.bfloat16, 256.0, 1.0), (torch.float32, 2.0**24, 1.0)])
def test_a_sum_is_rounded_in_the_dtype_of_the_queries(form, dtype, large, small):
    """Add so little that the sum rounds to the score: the target ties with an item of that score."""
    items = torch.tensor([[large], [large], [1.0]], dtype=dtype)
    added = kernels.AddedScores(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([small], dtype=dtype))
    for target in (0, 1):
        arguments = torch.ones(1, 1, dtype=dtype), items, torch.tensor([target]), torch.tensor([[-1]])
        masked, unmasked = kernels.target_rank(*arguments, form=form, added=added)
        assert masked.tolist() == unmasked.tolist() == [1.5]
