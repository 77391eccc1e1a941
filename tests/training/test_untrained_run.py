"""Check runs of the method neighbours, which trains nothing: figures, folder, resumption, damage, refused settings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import iisan_fast
from helpers.command_line import iisan_fast as command
from helpers.command_line import refused
from iisan_fast import InputError, ViewConfig
from iisan_fast.config import EvaluationConfig, ModelConfig, RunConfig, ScoringConfig, TrainConfig, UncachedConfig
from iisan_fast.evaluation import ranking_metrics
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_verification import verify_run
from iisan_fast.training.scoring import COOCCURRENCE_GRID, SIMILARITY_GRID

CPU = torch.device("cpu")
FIGURES = EvaluationConfig()
FILES = {"config.json", "environment.json", "views.json", "sequences.npz", "items.npz", "checksums.json"}
FILES |= {"neighbours.safetensors", "metrics.jsonl", "test.json", "lock"}


@pytest.fixture(scope="module")
def finished(toy_run, tmp_path_factory) -> tuple[Path, dict]:
    """Return the folder and the figures of a run with a cache."""
    dataset, cache = toy_run
    folder = tmp_path_factory.mktemp("neighbours") / "run"
    result = iisan_fast.train(dataset, cache, method="neighbours", out=folder, device="cpu")
    del result["run"]
    return folder, result


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the run, which the test may change."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def validation_line(run: Path) -> dict:
    (line,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return line


def test_the_run_ranks_by_popularity_and_both_terms(finished):
    run, result = finished
    assert {path.name for path in run.iterdir()} == FILES
    baseline = dict(result["neighbours"])
    assert baseline.pop("similarity") is True and result["test"] == baseline
    assert (result["method"], result["epochs"], result["best_epoch"]) == ("neighbours", 0, 0)
    assert result["scoring"] == {"cooccurrence": 2.0, "similarity": 9.0, "cold_bias": 0.0}
    assert result["trainable_parameters"] == 0
    line = validation_line(run)
    assert line["validation"] == result["validation"] and line["validation"]["split"] == "validation"
    assert json.loads((run / "test.json").read_text()) == result
    assert verify_run(run).damage == []


def test_without_weights_it_ranks_by_the_clamped_training_counts(toy_run, tmp_path):
    dataset, _ = toy_run
    settings = {"method": "neighbours", "cooccurrence": 0, "device": "cpu"}
    result = iisan_fast.train(dataset, out=tmp_path / "run", **settings)
    sequences = load(tmp_path / "run", CPU).sequences
    counts = np.maximum(sequences.training_counts[1:], 0.5)
    split = sequences.split("test")
    ranks = []
    for history, target in zip(split.history, split.targets):
        if target in history:
            ranks.append(np.inf)
            continue
        others = np.delete(counts, [*(np.unique(history[history > 0]) - 1), target - 1])
        ties = (others == counts[target - 1]).sum()
        ranks.append(1 + (others > counts[target - 1]).sum() + 0.5 * ties)
    assert {name: result["test"]["masked"][name] for name in ("hr@10", "ndcg@10", "mrr")} == pytest.approx(
        ranking_metrics(np.array(ranks), (10,)), abs=1e-12
    )
    assert result["neighbours"]["similarity"] is False and result["scoring"]["similarity"] == 0.0
    assert json.loads((tmp_path / "run" / "views.json").read_text()) == {}


def test_evaluation_and_loading_take_the_run(finished):
    run, result = finished
    again = evaluate_run(run, "validation", FIGURES, CPU)
    assert again["validation"] == result["validation"] and again["method"] == "neighbours"
    assert evaluate_run(run, "test", FIGURES, CPU)["test"] == result["test"]
    other = evaluate_run(run, "test", FIGURES, CPU, ScoringConfig(cooccurrence=0.0, similarity=3.0))
    assert other["scoring"] == {"cooccurrence": 0.0, "similarity": 3.0, "cold_bias": 0.0}
    assert other["test"] != result["test"]
    best = load(run, CPU)
    assert (best.epoch, best.weights) == (0, (2.0, 9.0, 0.0)) and best.user_states().tolist() == [[1.0]] * 60
    scores = best.scores()
    assert scores.queries.shape == (60, 33) and scores.vectors.shape == (40, 33)


def test_weights_are_fitted_on_the_validation_users(finished, toy_run, tmp_path):
    dataset, cache = toy_run
    settings = {"method": "neighbours", "fit_terms": True, "device": "cpu"}
    result = iisan_fast.train(dataset, cache, out=tmp_path / "run", **settings)
    figures = {}
    for cooccurrence in COOCCURRENCE_GRID:
        for similarity in SIMILARITY_GRID:
            asked = ScoringConfig(cooccurrence=cooccurrence, similarity=similarity)
            report = evaluate_run(finished[0], "validation", FIGURES, CPU, asked)["validation"]["masked"]
            figures[cooccurrence, similarity] = report["hr@10"], report["ndcg@10"]
    best = max(figures.values())
    expected = min(weights for weights, values in figures.items() if values == best)
    weights = load(tmp_path / "run", CPU).weights
    assert weights == (*expected, 0.0) and result["scoring"] == weights._asdict()


def test_resume_returns_the_figures_or_ranks_again(run, finished):
    expected = finished[1]
    assert resume(run, CPU) == expected
    (run / "test.json").unlink()
    seen = []
    assert resume(run, CPU, seen.append) == expected
    assert [line["validation"] for line in seen] == [expected["validation"]]
    (run / "test.json").write_bytes(b"damaged")
    (run / "neighbours.safetensors").unlink()
    assert resume(run, CPU) == expected
    assert verify_run(run).damage == []


def test_data_that_has_moved_is_recorded_if_it_is_the_same(run, finished, toy_run, tmp_path):
    places = [str(shutil.copytree(path, tmp_path / path.name)) for path in toy_run]
    assert resume(run, CPU, changes=RunChanges(dataset=places[0], cache=places[1])) == finished[1]
    saved = json.loads((run / "config.json").read_text())
    assert [saved["dataset"], saved["cache"]] == places
    with pytest.raises(InputError, match="max_epochs: neighbours trains nothing, found 5; leave it out"):
        resume(run, CPU, changes=RunChanges(max_epochs=5))
    with pytest.raises(InputError, match="gone"):
        resume(run, CPU, changes=RunChanges(cache=str(tmp_path / "gone")))


@pytest.mark.parametrize("content", ["1\n", "[]\n", "", "{"])
def test_verify_names_metrics_that_are_no_epochs(run, content):
    (run / "metrics.jsonl").write_text(content)
    assert [damage.where for damage in verify_run(run).damage] == ["metrics.jsonl"]


def test_verify_names_what_is_damaged(run):
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"users": 60', '"users": 61'))
    (damage,) = verify_run(run).damage
    assert damage.where == "metrics.jsonl" and "remove test.json" in damage.remedy
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "method": "id"}}))
    assert sorted(part.where for part in verify_run(run).damage) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_dry_run_writes_nothing_and_names_the_files(toy_run, tmp_path, with_cache):
    dataset, cache = toy_run
    call = {"cache": cache if with_cache else None, "method": "neighbours", "out": tmp_path / "run", "device": "cpu"}
    plan = iisan_fast.train(dataset, dry_run=True, **call)
    assert not (tmp_path / "run").exists() and json.loads(json.dumps(plan)) == plan
    assert (plan["max_epochs"], plan["parameters"]["total"], len(plan["views"])) == (0, 0, 2 * with_cache)
    iisan_fast.train(dataset, **call)
    assert set(plan["files"]["written"]) == set(os.listdir(tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["format"]
    assert saved == plan["config"]


def test_on_the_command_line(toy_run, tmp_path):
    dataset, cache = toy_run
    new = ("train", dataset, "--method", "neighbours", "--cache", cache, "--out", tmp_path / "run", "--device", "cpu")
    assert "would train neighbours" in command(*new, "--dry-run").stdout
    trained = command(*new)
    assert trained.returncode == 0 and "validation HR@10" in trained.stderr and "neighbours" in trained.stdout
    evaluated = command("evaluate", tmp_path / "run", "--similarity", "0", "--json", "--device", "cpu")
    assert json.loads(evaluated.stdout)["scoring"] == {"cooccurrence": 2.0, "similarity": 0.0, "cold_bias": 0.0}
    assert (
        json.loads(command("evaluate", tmp_path / "run", "--json", "--device", "cpu").stdout)["test"]
        == json.loads(command("train", "--resume", tmp_path / "run", "--json", "--device", "cpu").stdout)["test"]
    )
    other = ("train", dataset, "--method", "neighbours", "--out", tmp_path / "other")
    assert "epochs: neighbours trains nothing, found 5; leave it out" in refused(*other, "--epochs", "5")
    assert "similarity: compares states of a cache" in refused(*other, "--similarity", "6")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": TrainConfig(seed=1)}, "seed: neighbours trains nothing, found 1; leave it out"),
        ({"train": TrainConfig(learning_rates={"heads": 0.1})}, "learning_rates: neighbours trains nothing"),
        (
            {"train": TrainConfig(checkpoint_every="10m")},
            'checkpoint_every: neighbours trains nothing, found "10m"; leave it out',
        ),
        ({"model": ModelConfig("neighbours", embedding_dim=16)}, "embedding_dim: neighbours trains nothing"),
        ({"model": ModelConfig("neighbours", dropout=0.2)}, "dropout: neighbours trains nothing"),
        ({"uncached": UncachedConfig((ViewConfig("t", "title", "e"),))}, "uncached: neighbours runs no encoders"),
        ({"views": ("title",)}, "cache, views: neighbours takes a cache and its views, or neither"),
        ({"cache": "states"}, "cache, views: neighbours takes a cache and its views, or neither"),
        ({"cache": "states", "views": tuple("abc")}, "views: neighbours takes none, 1 or 2, found 3"),
    ],
)
def test_settings_without_an_effect_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RunConfig("dataset", **{"model": ModelConfig("neighbours"), **settings})


def test_towers_are_refused_too():
    with pytest.raises(InputError, match="bottleneck: neighbours has no towers"):
        ModelConfig("neighbours", bottleneck=8)


@pytest.mark.long
def test_the_demo_can_be_ranked_without_training(tmp_path):
    result = iisan_fast.train(method="neighbours", out=tmp_path / "run", device="cpu")
    assert result["neighbours"]["similarity"] is True
    assert result["test"]["masked"]["hr@10"] > result["popularity"]["masked"]["hr@10"]
