"""Check metrics against torchmetrics, both kinds of masking, warm and cold targets, and scores that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import iisan_fast.evaluation.metrics as evaluation
from helpers.datasets import make_sequences
from iisan_fast.config import EvaluationConfig
from iisan_fast.errors import InputError
from iisan_fast.evaluation.metrics import evaluate, popularity_baseline, ranking_metrics
from iisan_fast.kernels import AddedScores
from iisan_fast.kernels.cpu import library as compiled_library

KS = (1, 5, 10, 50)


def random_case(users=40, items=60, seed=0):
    rng = np.random.default_rng(seed)
    sequences = make_sequences([rng.integers(1, items + 1, rng.integers(5, 14)).tolist() for _ in range(users)], items)
    generator = torch.Generator().manual_seed(seed)
    return sequences, torch.randn(users, 8, generator=generator), torch.randn(items, 8, generator=generator)


def torchmetrics_figures(sequences, queries, vectors, split, masked):
    library = pytest.importorskip("torchmetrics.retrieval")
    task = sequences.split(split)
    scores = (queries @ vectors.T).exp()  # torchmetrics counts a score of at most 0 as a miss
    if masked:
        for user, history in enumerate(task.history):
            scores[user, history[history > 0] - 1] = 0
    target = torch.zeros_like(scores, dtype=torch.bool)
    target[torch.arange(len(scores)), torch.from_numpy(task.targets - 1)] = True
    reachable = torch.from_numpy(task.reachable if masked else np.ones(len(scores), bool))
    # torchmetrics has no unreachable targets, so these users enter as misses.
    share = reachable.float().mean().item()
    indexes = torch.arange(len(scores))[:, None].expand_as(scores)[reachable].flatten()
    arguments = (scores[reachable].flatten(), target[reachable].flatten(), indexes)
    figures = {"mrr": library.RetrievalMRR()(*arguments).item() * share}
    for k in KS:
        figures[f"hr@{k}"] = library.RetrievalHitRate(top_k=k)(*arguments).item() * share
        figures[f"ndcg@{k}"] = library.RetrievalNormalizedDCG(top_k=k)(*arguments).item() * share
    return figures


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("masked", [True, False])
def test_metrics_agree_with_torchmetrics(split, masked):
    sequences, queries, vectors = random_case()
    report = evaluate(queries, vectors, sequences, split, EvaluationConfig(KS))
    ours = report["masked" if masked else "unmasked"]
    assert report["unreachable"] > 0
    for name, value in torchmetrics_figures(sequences, queries, vectors, split, masked).items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_chunks_change_nothing():
    sequences, queries, vectors = random_case(users=3000, items=100)
    whole = evaluate(queries, vectors, sequences, "test", EvaluationConfig((10,), chunk_mib=1000))
    assert evaluate(queries, vectors, sequences, "test", EvaluationConfig((10,), chunk_mib=1)) == whole


def test_warm_and_cold_targets_make_up_the_whole():
    sequences, queries, vectors = random_case(users=60, items=300)
    report = evaluate(queries, vectors, sequences, "test", EvaluationConfig(KS))
    for history in ("masked", "unmasked"):
        warm, cold = report[history]["warm"], report[history]["cold"]
        assert warm["users"] + cold["users"] == 60 and warm["users"] > 0 and cold["users"] > 0
        mean = (warm["users"] * warm["mrr"] + cold["users"] * cold["mrr"]) / 60
        assert report[history]["mrr"] == pytest.approx(mean)


def test_an_unreachable_target_is_a_miss_when_masked():
    sequences = make_sequences([[1, 2, 3, 4, 1]])
    vectors = torch.tensor([[9.0], [1.0], [2.0], [3.0]])
    report = evaluate(torch.ones(1, 1), vectors, sequences, "test", EvaluationConfig((10,)))
    assert report["unreachable"] == 1
    assert report["masked"]["hr@10"] == 0 and report["masked"]["mrr"] == 0
    assert report["unmasked"]["hr@10"] == 1 and report["unmasked"]["mrr"] == 1


def test_ties_count_half():
    values = ranking_metrics(np.array([1.5, 2.0]), (1, 2))
    assert values["hr@1"] == 0 and values["hr@2"] == 1
    assert values["mrr"] == pytest.approx((1 / 1.5 + 1 / 2) / 2)
    assert ranking_metrics(np.array([]), (1,)) == {"hr@1": None, "ndcg@1": None, "mrr": None}


def test_the_popularity_baseline_on_a_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(compiled_library, "_library", lambda dtype: pytest.fail("the C++ library was asked for"))
    sequences, _, _ = random_case()
    assert popularity_baseline(sequences, "test", EvaluationConfig((10,)))["users"] == 40


def test_popularity_ranks_by_training_count():
    sequences = make_sequences([[1, 1, 2, 2, 3], [1, 1, 1, 3, 2]], items=4)
    report = popularity_baseline(sequences, "test", EvaluationConfig((1, 2, 3)))
    # Training counts: item 1 five times, item 2 once. The first user's target 3 ties with 4, behind nothing once
    # 1 and 2 are masked; the second user's target 2 leads once 1 and 3 are.
    assert report["masked"]["hr@1"] == 0.5 and report["masked"]["hr@2"] == 1
    assert report["unmasked"]["mrr"] == pytest.approx((1 / 3.5 + 1 / 2) / 2)


def test_a_score_that_is_not_finite_is_an_error():
    sequences, queries, vectors = random_case()
    vectors[3, 0] = float("inf")
    with pytest.raises(InputError, match="40 of 40 users have a score that is not finite"):
        evaluate(queries, vectors, sequences, "test", EvaluationConfig())


def test_ties_count_half_or_in_the_targets_favour():
    sequences, queries, vectors = random_case()
    vectors[:] = vectors[:1]  # every item ties with every other
    half, best = (evaluate(queries, vectors, sequences, "test", EvaluationConfig(KS, ties=t)) for t in ("half", "best"))
    assert half["unmasked"]["hr@10"] == 0 and half["unmasked"]["mrr"] == pytest.approx(1 / (1 + 59 / 2))
    assert best["unmasked"]["hr@1"] == 1 and best["ties"] == "best"
    reachable = 1 - best["unreachable"] / best["users"]
    assert best["masked"]["hr@1"] == pytest.approx(reachable)


def added_at_random(users: int, items: int) -> tuple[np.ndarray, evaluation.Added]:
    """Return small whole numbers to add to about a fifth of the scores, float64 [users, items], and their entries."""
    rng = np.random.default_rng(2)
    dense = np.where(rng.random((users, items)) < 0.2, rng.integers(-3, 4, (users, items)), 0).astype(np.float64)

    def added(rows: np.ndarray) -> AddedScores:
        part = torch.from_numpy(dense[rows])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (part != 0).sum(1).cumsum(0)])
        return AddedScores(offsets, part.nonzero()[:, 1], part[part != 0])

    return dense, added


def test_added_scores_count_as_further_dimensions_do(monkeypatch):
    """Rank with added scores, and by vectors whose further dimensions, one a user, add the same."""
    sequences, queries, vectors = random_case(users=50, items=60)
    queries, vectors = queries.double(), vectors.double()
    dense, added = added_at_random(50, 60)
    wider = torch.cat([queries, torch.eye(50).double()], 1), torch.cat([vectors, torch.from_numpy(dense).T], 1)
    expected = evaluate(*wider, sequences, "test", EvaluationConfig(KS))
    assert evaluate(queries, vectors, sequences, "test", EvaluationConfig(KS), added) == expected
    assert evaluate(queries, vectors, sequences, "test", EvaluationConfig(KS)) != expected
    calls = []
    monkeypatch.setattr(evaluation, "ADDED_AT_ONCE", 7)
    ranks = evaluate(
        queries, vectors, sequences, "test", EvaluationConfig(KS), lambda rows: (calls.append(rows), added(rows))[1]
    )
    assert ranks == expected
    assert max(map(len, calls)) <= 7 and np.array_equal(np.concatenate(calls), np.arange(50))


def test_an_added_score_that_is_not_finite_is_an_error():
    sequences, queries, vectors = random_case()

    def added(rows: np.ndarray) -> AddedScores:
        first = torch.from_numpy(rows == 0).long()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), first.cumsum(0)])
        return AddedScores(offsets, torch.tensor([5]), torch.tensor([float("inf")]))

    with pytest.raises(InputError, match="1 of 40 users have a score that is not finite"):
        evaluate(queries, vectors, sequences, "test", EvaluationConfig(), added)


def test_long_histories_are_ranked_in_parts_with_the_same_ranks(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(5, 14, 30).tolist(), 90]
    sequences = make_sequences([rng.integers(1, 41, length).tolist() for length in lengths], items=40)
    queries, vectors = torch.randn(31, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    split = sequences.split("test")
    config = EvaluationConfig()
    assert len(evaluation._parts(split)) == 1
    expected = evaluation.target_ranks(queries, vectors, split, config)
    monkeypatch.setattr(evaluation, "HISTORIES_AT_ONCE", 100)
    parts = evaluation._parts(split)
    assert sorted(np.concatenate(parts)) == list(range(31)) and len(parts) > 3
    assert all(len(part) == 1 or len(part) * split.padded(part).shape[1] <= 100 for part in parts)
    for ranks, whole in zip(evaluation.target_ranks(queries, vectors, split, config), expected):
        np.testing.assert_array_equal(ranks, whole)
