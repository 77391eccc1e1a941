"""The accuracy benchmark: it resumes, says which commits trained, and judges its bounds; an ablation reads no test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from iisan_fast.benchmarks import ablation, accuracy, accuracy_runs
from iisan_fast.benchmarks.accuracy import bound, bounds
from iisan_fast.benchmarks.accuracy_runs import Data
from iisan_fast.benchmarks.machine import last_commit
from iisan_fast.config import ProtocolConfig
from iisan_fast.errors import InputError

NO_TERM = {"cooccurrence": 0.0, "similarity": 0.0, "cold_bias": 0.0}
SMALL = {"train.batch_users": 16, "model.embedding_dim": 16}
PAPER = {"model.method": "iisan-versa", "train.max_epochs": 3, **SMALL}
RECIPE = {
    "model": {"method": "frozen", "embedding_dim": 16},
    "train": {"max_epochs": 1, "batch_users": 16},
    "scoring": {"cooccurrence": 1.5, "similarity": 3.0},
}


@pytest.fixture
def data(toy_run, tmp_path, monkeypatch) -> Iterator[Data]:
    """Return the toy dataset with its states, and small settings of the paper's form."""
    dataset, cache = toy_run
    for module in (accuracy, accuracy_runs, ablation):
        monkeypatch.setattr(module, "PAPER", PAPER)
    monkeypatch.setattr(accuracy_runs, "PROTOCOL", ProtocolConfig())
    monkeypatch.setattr(accuracy_runs, "commit", lambda: "first")
    work = tmp_path / "work"
    work.mkdir()
    (work / "states").symlink_to(cache)
    return Data(dataset, ("image", "title"), work)


def test_a_repeated_call_takes_finished_runs_and_keeps_their_commits(data, monkeypatch):
    result = accuracy.accuracy(data, RECIPE, [0, 1])
    monkeypatch.setattr(accuracy_runs, "commit", lambda: "second")
    (data.work / "paper-seed-1" / "test.json").unlink()  # as after a kill before the test
    (data.work / "strong-seed-0.commits.json").unlink()  # as of a run from elsewhere
    again = accuracy.accuracy(data, RECIPE, [0, 1])
    assert again["mean_over_seeds"] == result["mean_over_seeds"] and again["bounds"] == result["bounds"]
    commits = {row["run"]: row["commits"] for form in ("paper", "strong") for row in again["runs"][form]}
    assert commits == {
        "paper-seed-0": ["first"],
        "paper-seed-1": ["first", "second"],
        "strong-seed-0": ["not recorded"],
        "strong-seed-1": ["first"],
    }
    assert [row["scoring"] for row in result["runs"]["paper"]] == [NO_TERM] * 2
    assert result["runs"]["strong"][0]["scoring"] == {**NO_TERM, "cooccurrence": 1.5, "similarity": 3.0}
    stored = json.loads((data.work / "strong-seed-1" / "test.json").read_text())
    assert result["runs"]["strong"][1]["test"]["hr@10"] == stored["test"]["masked"]["hr@10"]
    assert result["runs"]["neighbours"][0]["test"]["ndcg@10"] == stored["neighbours"]["masked"]["ndcg@10"]
    difference = result["strong_minus_paper_with_terms"]["difference"]["hr@10"]
    means = result["mean_over_seeds"]
    expected = means["strong"]["test"]["hr@10"] - means["paper_with_terms"]["test"]["hr@10"]
    assert difference == pytest.approx(expected)
    assert means["paper_with_terms"]["test"] != means["paper"]["test"]
    scored = result["runs"]["paper_scored_as_strong"][0]
    assert scored["scoring"] == {**NO_TERM, "cooccurrence": 1.5, "similarity": 3.0} and scored["run"] == "paper-seed-0"
    gain = result["strong_minus_paper_scored_as_strong"]["difference"]["hr@10"]
    expected = means["strong"]["test"]["hr@10"] - means["paper_scored_as_strong"]["test"]["hr@10"]
    assert gain == pytest.approx(expected)


def test_a_run_with_other_settings_is_refused(data):
    accuracy_runs.trained(data.configuration({}, PAPER, 0), data.work / "run")
    other = data.configuration({}, {**PAPER, "model.dropout": 0.2}, 0)
    with pytest.raises(InputError, match="model: dropout 0.1 there, 0.2 now"):
        accuracy_runs.trained(other, data.work / "run")


def test_the_ablation_reads_validation_alone(data, monkeypatch):
    monkeypatch.setattr(ablation, "OPTIONS", {"paper's form": {}})
    result = ablation.ablation(data, RECIPE, seed=0, epochs=2)
    assert ablation.ablation(data, RECIPE, seed=0, epochs=2) == result
    assert not list(data.work.rglob("test.json"))
    paper, strong = result["rows"]
    assert (paper["option"], strong["option"]) == ("paper's form", "strong")
    assert paper["epochs"] == strong["epochs"] == 2 and paper["commits"] == ["first"]
    assert list(paper["validation"]) == [
        *("no term", "cooccurrence", "similarity"),
        *("both terms", "both terms, cold_bias 1"),
    ]
    metrics = data.work / "ablation" / "paper's-form,-2-epochs,-seed-0" / "metrics.jsonl"
    reports = [json.loads(line)["validation"]["masked"] for line in metrics.read_text().splitlines()]
    assert paper["validation"]["no term"]["hr@10"] == max(report["hr@10"] for report in reports)


def test_every_option_of_the_ablation_is_a_configuration_of_its_own(data):
    configurations = [data.configuration({}, {**PAPER, **changes}, 0) for changes in ablation.OPTIONS.values()]
    assert len(set(map(str, configurations))) == len(ablation.OPTIONS) > 15


@pytest.mark.parametrize(
    ("measured", "limit", "verdict"),
    [
        (7.5, {"least": 7.5}, "met"),
        (7.49, {"least": 7.5}, "not met"),
        (0.05, {"below": 0.05}, "not met"),
        (0.5, {"most": 0.5}, "met"),
    ],
)
def test_a_bound_is_judged_by_its_figure(measured, limit, verdict):
    row = bound("must", "figure", measured, **limit)
    assert row == {"kind": "must", "figure": "figure", "measured": measured, **limit, "verdict": verdict}


def test_every_bound_is_judged():
    def form(hr: float, ndcg: float, cold: float, epochs: int) -> dict:
        test = {"hr@10": hr, "ndcg@10": ndcg, "cold_hr@10": cold}
        return {"test": test, "epochs": epochs, "best_epoch": epochs - 10}

    means = {
        "paper": form(0.0765, 0.046, 0.02, 50),
        "neighbours": form(0.093, 0.058, 0.05, 0),
        "paper_with_terms": form(0.1, 0.06, 0.05, 50),
        "paper_scored_as_strong": form(0.109, 0.06, 0.05, 50),
        "strong": form(0.111, 0.071, 0.056, 26),
    }
    compared = {"difference": {"hr@10": 0.011}, "p_value": {"hr@10": 0.2}}
    at_equal_scoring = {"difference": {"hr@10": 0.002}, "p_value": {"hr@10": 0.3}}
    failed = [row["figure"] for row in bounds(means, compared, at_equal_scoring) if row["verdict"] == "not met"]
    assert failed == [
        "NDCG@10 of neighbours",
        "p of that difference, over users",
        "HR@10 of strong less that of the paper's form scored as strong is",
        "epochs of strong as a share of the paper's form",
    ]


def test_a_recipe_has_to_be_committed_as_it_is(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {}\n")
    with pytest.raises(InputError, match="found no commit of it"):
        last_commit(recipe)
    git(tmp_path, "init", "-q")
    with pytest.raises(InputError, match="found no commit of it"):
        last_commit(recipe)
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-q", "-m", "A recipe")
    assert last_commit(recipe) == git(tmp_path, "rev-parse", "HEAD")
    recipe.write_text("model: {method: frozen}\n")
    with pytest.raises(InputError, match=r"found it changed \(M recipe.yaml\); commit it, then run again"):
        last_commit(recipe)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
