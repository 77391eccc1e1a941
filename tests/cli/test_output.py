"""Tables of a run's figures: the baselines beside the model, the weights of added terms, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from iisan_fast.cli.output import print_run_metrics

PART = {"users": 2, "hr@10": 0.5, "ndcg@10": 0.25, "mrr": 0.125}
REPORT = {"split": "test", "users": 4, "unreachable": 0, "ties": "half"}
REPORT |= {history: {**PART, "warm": PART, "cold": PART} for history in ("masked", "unmasked")}
for history in ("masked", "unmasked"):
    del REPORT[history]["users"]


def printed(capsys, **changes: Any) -> str:
    """Return the text of a result's tables, its spaces made single."""
    print_run_metrics("run", {"method": "iisan", "test": REPORT, "popularity": REPORT, **changes}, "test")
    return " ".join(capsys.readouterr().out.split())


def test_the_baselines_are_beside_the_model(capsys):
    text = printed(capsys, neighbours=REPORT | {"similarity": True}, scoring={"cooccurrence": 0, "similarity": 0})
    places = [text.index(f"{name} │ masked") for name in ("iisan", "popularity", "neighbours")]
    assert places == sorted(places)
    assert "similarity" not in text and "cooccurrence" not in text


def test_a_baseline_without_similarity_says_so(capsys):
    text = printed(capsys, neighbours=REPORT | {"similarity": False})
    assert "neighbours without similarity, which needs cached states" in text


@pytest.mark.parametrize(
    ("scoring", "title"),
    [
        ({"cooccurrence": 2.0, "similarity": 6.5}, "run, cooccurrence 2, similarity 6.5 ┏"),
        ({"cooccurrence": 0.0, "similarity": 6.0}, "run, similarity 6 ┏"),
    ],
)
def test_the_title_says_the_weights_of_added_terms(capsys, scoring, title):
    assert printed(capsys, scoring=scoring).startswith(title)


def test_a_result_of_an_earlier_version_is_printed_too(capsys):
    text = printed(capsys)
    assert "popularity │ masked" in text and "neighbours" not in text


def test_a_run_of_the_method_neighbours_is_one_row(capsys):
    text = printed(capsys, method="neighbours", neighbours=REPORT | {"similarity": True})
    assert text.count("neighbours │ masked │ all") == 1 and "popularity │ masked" in text
