"""Several targets a user: by hand, beside a brute-force reference with ties and masks, and in the printed text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import iisan_fast.evaluation.metrics as evaluation
from iisan_fast.config import EvaluationConfig
from iisan_fast.data.sequences import Sequences
from iisan_fast.evaluation.metrics import evaluate, popularity_baseline, ranking_metrics, target_ranks, user_gains
from iisan_fast.evaluation.significance import paired_test

PAGE = (Path(__file__).parents[2] / "docs" / "protocol-and-metrics.md").read_text(encoding="utf-8")
KS = (1, 3, 10)


def divided(users: list[tuple[list[int], list[int], list[int]]], items: int) -> Sequences:
    """Return the sequences of users' interactions in training, validation and test, item numbers."""
    flat = [item for training, validation, test in users for item in (*training, *validation, *test)]
    lengths = np.array([[len(part) for part in parts] for parts in users])
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))])
    first = offsets[:-1] + lengths[:, 0]
    starts = {"validation": first, "test": first + lengths[:, 1]}
    counts = {"validation": lengths[:, 1], "test": lengths[:, 2]}
    return Sequences(
        [f"u{number}" for number in range(len(users))],
        [f"i{number}" for number in range(1, items + 1)],
        offsets,
        np.array(flat),
        max_inputs=10,
        training_ends=first,
        targets={name: np.where(counts[name] > 0, places, -1) for name, places in starts.items()},
        target_counts=counts,
    )


def evaluated(sequences: Sequences, scores: np.ndarray, split="test", **settings) -> dict:
    """Return the report of a model that gives each user these scores, [users, items]."""
    rows = sequences.split(split).users
    vectors = torch.from_numpy(np.ascontiguousarray(scores.T)).double()
    return evaluate(torch.eye(len(scores)).double()[rows], vectors, sequences, split, EvaluationConfig(KS, **settings))


def reference(users, scores: np.ndarray, split: str, masked: bool, ties: str) -> dict[str, dict]:
    """Return the metrics of all, warm and cold targets, one user and one item at a time."""
    warm = {item for training, _, _ in users for item in training}
    totals: dict[str, list[dict[str, float]]] = {"all": [], "warm": [], "cold": []}
    for (training, validation, test), row in zip(users, scores):
        history = training if split == "validation" else training + validation
        targets = list(dict.fromkeys(validation if split == "validation" else test))
        if not (history and targets):
            continue
        ranks = {}
        for item in targets:
            others = [i for i in range(1, len(row) + 1) if i not in history or not masked]
            higher = sum(row[i - 1] > row[item - 1] for i in others)
            equal = sum(row[i - 1] == row[item - 1] for i in others if i not in targets)
            before = [i for i in ranks if row[i - 1] == row[item - 1] and ranks[i] < math.inf]
            reachable = item in others
            ranks[item] = 1 + higher + (equal / 2 if ties == "half" else 0) + len(before) if reachable else math.inf
        parts = {
            "all": targets,
            "warm": [item for item in targets if item in warm],
            "cold": [item for item in targets if item not in warm],
        }
        for part, items in parts.items():
            if not items:
                continue
            values = {"mrr": 1 / min(ranks[item] for item in items), "targets": len(items)}
            for k in KS:
                hits = [ranks[item] for item in items if ranks[item] <= k]
                ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(items)) + 1))
                values[f"hr@{k}"] = float(bool(hits))
                values[f"recall@{k}"] = len(hits) / len(items)
                values[f"ndcg@{k}"] = sum(1 / math.log2(rank + 1) for rank in hits) / ideal
            totals[part].append(values)
    return {part: means(rows) for part, rows in totals.items()}


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the means over users, and the numbers of users and targets."""
    values = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    return {**values, "users": len(rows), "targets": sum(row["targets"] for row in rows)}


@pytest.mark.parametrize("levels", [3, 10**6])  # few scores make ties, also among the targets of one user
@pytest.mark.parametrize("ties", ["half", "best"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_all_metrics_agree_with_a_brute_force_reference(levels, ties, split):
    rng = np.random.default_rng(levels)
    users = [
        tuple(
            rng.integers(1, last + 1, rng.integers(low, high)).tolist()
            for last, low, high in ((18, 1, 9), (25, 0, 4), (25, 0, 6))
        )
        for _ in range(60)
    ]
    users += [([1, 2], [3], [4, 5]), ([1, 2], [3, 4], [5])]
    scores = rng.integers(0, levels, (len(users), 25)).astype(np.float64)
    report = evaluated(divided(users, 25), scores, split, ties=ties)
    for name in ("masked", "unmasked"):
        expected = reference(users, scores, split, name == "masked", ties)
        assert (report["users"], report["targets"]) == (expected["all"].pop("users"), expected["all"].pop("targets"))
        warm, cold = report[name].pop("warm"), report[name].pop("cold")
        for part, values in (("all", report[name]), ("warm", warm), ("cold", cold)):
            assert values == pytest.approx(expected[part], abs=1e-12), (name, part)
            assert min(values.values()) >= 0 and max(values[f"ndcg@{k}"] for k in KS) <= 1 + 1e-12
    assert report["unreachable"] > 0 and report["several_targets"] == evaluation.SEVERAL_TARGETS


def test_the_example_of_the_page():
    """Rank the two users of docs/protocol-and-metrics.md."""
    users = [([1, 2], [3], [4, 5, 30]), ([5, 4], [6], [7]), ([7, 8], [9], [])]
    scores = np.zeros((3, 40))
    order = [[4, 10, 11, 5, 12, 13, 14, 15, 16, 17, 18, 30], [20, 21, 7]]
    for row, items in zip(scores, order):
        row[np.array(items) - 1] = np.arange(len(items), 0, -1)
    report = evaluated(divided(users, 40), scores)
    masked = report["masked"]
    assert (report["users"], report["targets"]) == (2, 4)
    first = 1 + 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / 2
    assert masked["hr@10"] == 1 and masked["recall@10"] == pytest.approx((2 / 3 + 1) / 2)
    assert masked["ndcg@10"] == pytest.approx((first[0] / first[1] + 1 / 2) / 2)
    assert masked["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert masked["cold"] == {
        "users": 1, "targets": 1, "mrr": pytest.approx(1 / 12),
        **{f"{name}@{k}": 0 for name in ("hr", "ndcg", "recall") for k in KS},
    }  # fmt: skip
    assert masked["warm"]["users"] == 2 and masked["warm"]["targets"] == 3
    assert masked["warm"]["ndcg@10"] == pytest.approx((first[0] / (1 + 1 / math.log2(3)) + 1 / 2) / 2)
    rows = [line for line in PAGE.splitlines() if line.startswith(("| u1 ", "| u2 ", "| **mean** "))]
    quoted = [[float(cell) for cell in row.split("|")[3:-1]] for row in rows]
    gains = user_gains(np.array([1, 4, 12, 3]), 10, np.array([0, 0, 0, 1]))
    values = np.stack([gains["hr@10"], gains["ndcg@10"], gains["recall@10"], [1, 1 / 3]], axis=1)
    np.testing.assert_allclose(quoted, np.vstack([values, values.mean(0)]), atol=5e-5)
    assert [masked[name] for name in ("hr@10", "ndcg@10", "recall@10", "mrr")] == pytest.approx(values.mean(0))


def test_tied_targets_of_a_user_stand_one_after_another():
    sequences = divided([([1], [2], [3, 4, 5]), ([1, 2], [3], [4])], 6)
    scores = np.array([[9, 9, 5, 5, 5, 0], [0, 0, 0, 5, 5, 5]], dtype=np.float64)
    report = evaluated(sequences, scores)["masked"]
    # The three targets of the first user fill the places 1 to 3; the second user's target has two equals.
    assert (report["hr@1"], report["recall@1"], report["ndcg@1"]) == (0.5, pytest.approx(1 / 6), 0.5)
    assert report["recall@3"] == 1 and report["ndcg@3"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    split = sequences.split("test")
    queries = torch.eye(2).double()[split.users]
    vectors = torch.from_numpy(scores.T.copy())
    for ties, expected in (("half", [1, 2, 3, 2]), ("best", [1, 2, 3, 1])):
        masked, _ = target_ranks(queries, vectors, split, EvaluationConfig(ties=ties))
        assert masked.tolist() == expected


def test_one_target_a_user_counts_as_it_did():
    ranks = np.array([1, 3, 1.5, 4, np.inf])
    alone = user_gains(ranks, 3)
    among = user_gains(ranks, 3, np.array([0, 2, 3, 5, 9]))
    assert alone.keys() == {"hr@3", "ndcg@3"}
    for name, values in alone.items():
        assert values.tolist() == among[name].tolist()
    assert among["recall@3"].tolist() == alone["hr@3"].tolist()
    metrics = ranking_metrics(ranks, KS, np.arange(5))
    assert {name: metrics[name] for name in ranking_metrics(ranks, KS)} == ranking_metrics(ranks, KS)
    report = evaluated(divided([([1, 2], [3], [4]), ([2, 1], [4], [3])], 5), np.ones((2, 5)))
    assert not {"targets", "several_targets", "without_history"} & report.keys()
    assert report["masked"]["warm"].keys() == {"users", *ranking_metrics(ranks, KS)}


def test_the_test_of_significance_pairs_users():
    sequences = divided([([1], [2], [3, 4]), ([2], [1], [3]), ([3], [1], [4, 5, 6])], 8)
    split = sequences.split("test")
    gains = []
    for seed in range(2):
        scores = np.random.default_rng(seed).random((3, 8))
        masked, _ = target_ranks(
            torch.eye(3).double()[split.users], torch.from_numpy(scores.T.copy()), split, EvaluationConfig()
        )
        gains.append(user_gains(masked, 3, split.repeated_users)["ndcg@3"])
    assert gains[0].shape == (3,) and 0 < paired_test(*gains) <= 1


def test_popularity_ranks_every_target():
    sequences = divided([([1, 1, 2], [3], [2, 4]), ([1, 2], [3], [1])], 4)
    report = popularity_baseline(sequences, "test", EvaluationConfig((1, 2)))
    # Counts 3, 2, 0, 0: the first user's targets rank 2 and 3.5 unmasked; 2 is in the history, 4 is alone masked.
    assert (report["users"], report["targets"], report["unreachable"]) == (2, 3, 2)
    assert report["unmasked"]["hr@1"] == 0.5 and report["unmasked"]["recall@2"] == 0.75
    assert report["masked"]["hr@1"] == 0.5 and report["masked"]["recall@1"] == 0.25


def test_targets_that_are_left_out_are_reported():
    sequences = divided([([1, 2], [3], [4]), ([2, 1], [4], [3])], 5)
    sequences = dataclasses.replace(sequences, without_history={"validation": 0, "test": 7})
    assert evaluated(sequences, np.ones((2, 5)))["without_history"] == 7
    assert "without_history" not in evaluated(sequences, np.ones((2, 5)), "validation")
