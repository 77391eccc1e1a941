"""The rank of a target against counting."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iisan_fast import kernels


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
    masked, unmasked = kernels.target_rank(
        torch.tensor(scores, dtype=torch.float64),
        torch.eye(count, dtype=torch.float64),
        torch.tensor(targets),
        torch.tensor(excluded, dtype=torch.int64).reshape(users, width),
        tie_share=tie_share,
        chunk_elements=data.draw(st.integers(1, 40)),
    )
    expected = [naive_rank(s, t, set(x) - {-1}, tie_share) for s, t, x in zip(scores, targets, excluded)]
    assert masked.tolist() == expected
    assert unmasked.tolist() == [naive_rank(s, t, set(), tie_share) for s, t in zip(scores, targets)]


def test_target_rank_of_a_score_that_is_not_finite_is_nan():
    items = torch.tensor([[1.0], [float("nan")], [2.0]])
    ranks = kernels.target_rank(torch.ones(1, 1), items, torch.tensor([0]), torch.full((1, 1), -1))
    assert all(rank.isnan().all() for rank in ranks)
