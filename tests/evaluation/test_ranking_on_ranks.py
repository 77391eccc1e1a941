"""Ranking on several ranks: item vectors, ranks of targets and figures are those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.rank_processes import run_on_ranks
from helpers.ranking_calls import CONFIG, broken_scores, random_histories, ranking, ranks_of_several_targets
from iisan_fast.data.sequences import Sequences
from iisan_fast.evaluation import evaluate
from iisan_fast.ranks import ALONE


@pytest.mark.parametrize(
    ("count", "users", "items", "items_at_once"), [(2, 41, 30, 100), (3, 20, 41, 12), (3, 2, 2, 1)]
)
def test_ranks_get_the_vectors_and_figures_of_one_process(count, users, items, items_at_once):
    expected = ranking(ALONE, users, items, items_at_once)
    results = run_on_ranks(count, ranking, users, items, items_at_once)
    assert sum(result["states"] for result in results) == expected["states"] == users
    for result in results:
        assert torch.equal(result["vectors"], expected["vectors"])
        for places, of_one in zip(result["ranks"], expected["ranks"], strict=True):
            np.testing.assert_array_equal(places, of_one)
        for name in ("report", "fitted", "baselines"):
            assert result[name] == expected[name]


def test_targets_of_one_user_may_lie_on_two_ranks():
    sequences = random_histories(5, 12)
    targets = {"validation": sequences.targets["validation"] - 2, "test": sequences.offsets[1:] - 3}
    counts = {"validation": np.ones(5, dtype=np.int64), "test": np.full(5, 3)}
    several = Sequences(
        sequences.user_ids,
        sequences.item_ids,
        sequences.offsets,
        sequences.items,
        sequences.max_inputs,
        targets["validation"],
        targets,
        counts,
    )
    rows = several.split("test").users
    queries = torch.eye(5, dtype=torch.float64)[torch.from_numpy(rows)]
    vectors = torch.randint(3, (12, 5), generator=torch.Generator().manual_seed(0)).double()  # with many ties
    expected = evaluate(queries, vectors, several, "test", CONFIG)
    assert expected["targets"] > len(np.unique(rows)) > 1
    assert run_on_ranks(3, ranks_of_several_targets, several, queries, vectors) == [expected] * 3


def test_all_ranks_refuse_scores_of_one_rank_that_are_not_finite():
    messages = run_on_ranks(2, broken_scores, 7)
    assert messages == [messages[0]] * 2
    assert messages[0].startswith("1 of 7 users have a score that is not finite")
