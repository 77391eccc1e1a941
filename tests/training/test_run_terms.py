"""Check the neighbour terms of a run: kept in its folder, used in its figures, fitted by validation, made again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iisan_fast
from helpers.run_folders import assert_same_run, flip_bit, without_later_figures
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast import InputError
from iisan_fast.config import EvaluationConfig, ModelConfig, RunConfig, ScoringConfig, TrainConfig
from iisan_fast.evaluation import ranking_metrics
from iisan_fast.training import scoring
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.run_verification import verify_run
from iisan_fast.training.scoring import COOCCURRENCE_GRID, SIMILARITY_GRID, Scoring, TermWeights
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
FIGURES = EvaluationConfig()
WEIGHTS = ScoringConfig(cooccurrence=2.0, similarity=6.0)
NEIGHBOURS = "neighbours.safetensors"


def with_scoring(config: RunConfig, **settings) -> RunConfig:
    return dataclasses.replace(config, scoring=ScoringConfig(**settings))


@pytest.fixture(scope="module")
def config(toy_run) -> RunConfig:
    """Return the settings of a small run of two epochs, whose terms have weights."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    return RunConfig(
        str(dataset), str(cache), ("image", "title"), model=model, train=TrainConfig(16, max_epochs=2), scoring=WEIGHTS
    )


@pytest.fixture(scope="module")
def with_terms(config, tmp_path_factory) -> tuple[Path, dict]:
    """Train a run with weighted terms; return its folder and its figures."""
    folder = tmp_path_factory.mktemp("terms") / "run"
    return folder, train(config, folder, CPU)


@pytest.fixture(scope="module")
def without_terms(config, tmp_path_factory) -> tuple[Path, dict]:
    """Train a run whose terms have no weight; return its folder and its figures."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, train(with_scoring(config), folder, CPU)


@pytest.fixture
def run(without_terms, tmp_path) -> Path:
    """Return a copy of the run without weights, which the test may change."""
    return Path(shutil.copytree(without_terms[0], tmp_path / "run"))


def as_of_an_earlier_version(run: Path) -> None:
    """Take the neighbour terms out of a run's folder, its record and its figures."""
    (run / NEIGHBOURS).unlink()
    folder = RunFolder.open(run)
    folder._write_record(folder._record.without_file(NEIGHBOURS))
    folder.write_test(without_later_figures(folder.figures))


def dense_ranks(run: Path, split: str, weights: tuple[float, float]) -> np.ndarray:
    """Return the ranks of a split's targets, history masked, by a dense matrix of scores in float64."""
    best = load(run, CPU)
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(run / NEIGHBOURS).items()}
    items = len(best.item_ids)
    matrix = np.zeros((items, items))
    offsets = tensors["cooccurrence.offsets"].astype(int)
    rows = np.repeat(np.arange(items), np.diff(offsets))
    matrix[rows, tensors["cooccurrence.items"].astype(int)] = tensors["cooccurrence.values"]
    scores = best.user_states(split).double().numpy() @ best.item_vectors.double().numpy().T
    histories = [history[history > 0] for history in best.sequences.split(split).history]
    vectors = tensors["similarity.vectors"]
    for user, history in enumerate(histories):
        sums = sum(0.7**age * matrix[item - 1] for age, item in enumerate(history[::-1]))
        profile = sum(0.7**age * vectors[item - 1] for age, item in enumerate(history[:-4:-1]))
        profile = profile / np.linalg.norm(profile)
        scores[user] += weights[0] * np.log1p(20 * sums) + weights[1] * vectors @ profile
    targets = best.sequences.split(split).targets - 1
    ranks = []
    for user, (history, target) in enumerate(zip(histories, targets)):
        if target + 1 in history:
            ranks.append(np.inf)
            continue
        others = np.delete(np.arange(items), [*(history - 1), target])
        ranks.append(1 + (scores[user, others] > scores[user, target]).sum())
    return np.array(ranks, dtype=float)


# In the figures of a run


def test_validation_and_test_rank_by_the_score_with_its_terms(with_terms, without_terms):
    run, result = with_terms
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = lines[result["best_epoch"] - 1]["validation"]["masked"]
    for split, figures in (("validation", best), ("test", result["test"]["masked"])):
        expected = ranking_metrics(dense_ranks(run, split, (2.0, 6.0)), (10,))
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert result["scoring"] == {"cooccurrence": 2.0, "similarity": 6.0, "cold_bias": 0.0}
    assert result["test"] != without_terms[1]["test"]
    assert [line["best"] for line in lines] == [True, lines[1]["validation"]["masked"]["hr@10"] > best_hr(lines[:1])]


def best_hr(lines: list[dict]) -> float:
    return max(line["validation"]["masked"]["hr@10"] for line in lines)


def test_evaluation_takes_the_weights_of_the_run_and_others_on_demand(with_terms, without_terms):
    run, result = with_terms
    plain, plain_result = without_terms
    assert evaluate_run(run, "test", FIGURES, CPU) == {
        name: result[name] for name in ("method", "best_epoch", "test", "popularity", "neighbours", "scoring")
    }
    plain_again = evaluate_run(plain, "test", FIGURES, CPU)
    assert plain_again["test"] == plain_result["test"]
    both = iisan_fast.evaluate(plain, cooccurrence=2, similarity=6, device="cpu")
    expected = ranking_metrics(dense_ranks(plain, "test", (2.0, 6.0)), (10,))
    assert {name: both["test"]["masked"][name] for name in expected} == pytest.approx(expected, abs=1e-12)
    one = iisan_fast.evaluate(run, similarity=0, device="cpu")
    assert one["scoring"] == {"cooccurrence": 2.0, "similarity": 0.0, "cold_bias": 0.0}
    scores = load(run, CPU).scores("validation")
    assert scores.queries.shape[1] > 16 and scores.added is not None
    assert load(plain, CPU).scores().added is None


def test_the_baselines_stand_beside_the_figures_and_without_states_similarity_is_left_out(config, with_terms, tmp_path):
    _, result = with_terms
    assert result["neighbours"]["similarity"] is True and result["neighbours"]["split"] == "test"
    id_config = RunConfig(config.dataset, model=ModelConfig("id", embedding_dim=16), train=TrainConfig(16, 1))
    of_id = train(id_config, tmp_path / "id", CPU)
    assert of_id["neighbours"]["similarity"] is False
    assert of_id["neighbours"]["masked"] != result["neighbours"]["masked"]
    assert of_id["popularity"] == result["popularity"]
    assert set(load_file(tmp_path / "id" / NEIGHBOURS)) == {
        f"cooccurrence.{name}" for name in ("offsets", "items", "values")
    }


# Fitted weights


def test_weights_are_fitted_by_validation_and_stored(config, without_terms, tmp_path):
    plain, _ = without_terms
    result = train(with_scoring(config, fit_terms=True), tmp_path / "run", CPU)
    figures = {}
    for cooccurrence in COOCCURRENCE_GRID:
        for similarity in SIMILARITY_GRID:
            ranks = dense_ranks(plain, "validation", (cooccurrence, similarity))
            metrics = ranking_metrics(ranks, (10,))
            figures[cooccurrence, similarity] = round(metrics["hr@10"], 9), round(metrics["ndcg@10"], 9)
    best = max(figures.values())
    expected = min(weights for weights, values in figures.items() if values == best)
    assert result["scoring"] == {"cooccurrence": expected[0], "similarity": expected[1], "cold_bias": 0.0}
    assert load(tmp_path / "run", CPU).weights == (*expected, 0.0)
    assert evaluate_run(tmp_path / "run", "test", FIGURES, CPU)["test"] == result["test"]
    asked = ScoringConfig(fit_terms=True)
    assert evaluate_run(plain, "test", FIGURES, CPU, asked)["scoring"] == result["scoring"]
    (tmp_path / "run" / "test.json").unlink()
    assert load(tmp_path / "run", CPU).weights == (*expected, 0.0)  # chosen again: the run is not tested yet
    assert resume(tmp_path / "run", CPU) == result


def test_of_equal_figures_ndcg_decides_and_then_the_smaller_weights(without_terms, monkeypatch):
    best = load(without_terms[0], CPU)
    figures = {(1.5, 3.0): (0.5, 0.2), (1.5, 6.0): (0.5, 0.3), (2.0, 0.0): (0.5, 0.3), (3.0, 9.0): (0.4, 0.4)}

    def report(self, queries, vectors, split, evaluation, weights) -> dict:
        hr, ndcg = figures.get(tuple(weights[:2]), (0.1, 0.1))
        return {"history_masked_by_default": True, "masked": {"hr@10": hr, "ndcg@10": ndcg}}

    monkeypatch.setattr(scoring.Scoring, "report", report)
    assert best.scoring.fitted(best.user_states("validation"), best.item_vectors, FIGURES, 0.5) == (1.5, 6.0, 0.5)


@pytest.mark.parametrize("stored", [None, {}, {"cooccurrence": 1.0}, [1, 2]])
def test_stored_values_that_are_no_weights_are_refused_in_one_line(stored):
    with pytest.raises(InputError, match="scoring: expected the numbers cooccurrence, similarity, cold_bias, found"):
        TermWeights.of_figures({"scoring": stored})


def test_stored_weights_below_0_are_refused_in_one_line():
    with pytest.raises(InputError, match="scoring: expected weights from 0, found"):
        TermWeights.of_figures({"scoring": {"cooccurrence": -1.0, "similarity": 0.0, "cold_bias": 0.0}})


# Items that do not occur in training


def test_the_bias_is_added_to_the_scores_of_cold_items_alone(with_terms, monkeypatch):
    run, _ = with_terms
    best = load(run, CPU)
    counts = best.sequences.training_counts.copy()
    counts[[2, 5]] = 0
    monkeypatch.setitem(vars(best.sequences), "training_counts", counts)
    queries = best.user_states("validation")
    weights = TermWeights(2.0, 6.0)
    plain = best.scoring.scores(queries, best.item_vectors, "validation", weights)
    biased = best.scoring.scores(queries, best.item_vectors, "validation", weights._replace(cold_bias=-0.75))
    added = biased.queries @ biased.vectors.T - plain.queries @ plain.vectors.T
    is_cold = torch.from_numpy(counts[1:] == 0)
    torch.testing.assert_close(added, torch.where(is_cold, -0.75, 0.0).expand_as(added), atol=1e-5, rtol=0)


def test_a_run_keeps_its_bias_and_evaluation_takes_another(config, without_terms, tmp_path):
    plain, plain_result = without_terms
    result = train(with_scoring(config, cold_bias=0.5), tmp_path / "run", CPU)
    assert result["scoring"] == {"cooccurrence": 0.0, "similarity": 0.0, "cold_bias": 0.5}
    assert result["test"] == plain_result["test"]  # no item of the toy dataset is cold
    assert load(tmp_path / "run", CPU).weights.cold_bias == 0.5
    asked = ScoringConfig(cold_bias=2.0, fit_terms=True)
    assert evaluate_run(plain, "test", FIGURES, CPU, asked)["scoring"]["cold_bias"] == 2.0
    other = evaluate_run(tmp_path / "run", "test", FIGURES, CPU, ScoringConfig(cold_bias=-1))
    assert other["scoring"]["cold_bias"] == -1.0


# Resumed runs


def test_a_run_with_terms_goes_on_to_the_results_of_one_that_was_not_stopped(config, with_terms, tmp_path):
    run, result = with_terms
    one = dataclasses.replace(config, train=dataclasses.replace(config.train, max_epochs=1))
    train(one, tmp_path / "run", CPU)
    assert resume(tmp_path / "run", CPU, changes=RunChanges(max_epochs=2)) == result
    assert_same_run(tmp_path / "run", run)
    assert (tmp_path / "run" / NEIGHBOURS).read_bytes() == (run / NEIGHBOURS).read_bytes()


def test_a_run_of_an_earlier_version_gets_its_terms_as_it_goes_on(run):
    content = (run / NEIGHBOURS).read_bytes()
    as_of_an_earlier_version(run)
    assert "scoring" not in resume(run, CPU)  # its figures as they are
    assert not (run / NEIGHBOURS).exists() and verify_run(run).damage == []
    assert "neighbours" in resume(run, CPU, changes=RunChanges(max_epochs=3))
    assert (run / NEIGHBOURS).read_bytes() == content and verify_run(run).damage == []


# The file


def test_a_run_of_an_earlier_version_is_evaluated_with_terms_from_its_histories_and_cache(run, without_terms, toy_run):
    expected = evaluate_run(run, "test", FIGURES, CPU, WEIGHTS)
    as_of_an_earlier_version(run)
    assert evaluate_run(run, "test", FIGURES, CPU, WEIGHTS) == expected
    assert not (run / NEIGHBOURS).exists()
    moved = json.loads((run / "config.json").read_text()) | {"cache": "/gone"}
    (run / "config.json").write_text(json.dumps(moved))
    report = evaluate_run(run, "test", FIGURES, CPU, ScoringConfig(cooccurrence=2.0))
    assert report["neighbours"]["similarity"] is False and report["popularity"] == expected["popularity"]
    message = "has no neighbours.safetensors, and its cache cannot give similarity: /gone"
    with pytest.raises(InputError, match=message):
        evaluate_run(run, "test", FIGURES, CPU, ScoringConfig(similarity=6.0))


def test_a_cache_that_has_changed_gives_an_earlier_run_no_similarity(run, tmp_path):
    as_of_an_earlier_version(run)
    table = random_table([(2, 16), (2, 16)], 40, torch.float32)
    item_ids = [f"i{number}" for number in range(1, 41)]
    cache = fill_store(tmp_path / "cache", item_ids, table, ("image", "title"), source="caption")
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | {"cache": str(cache)}))
    assert load(run, CPU).terms.similarity is None
    with pytest.raises(InputError, match="its cache cannot give similarity: .*view 'image' has changed since the run"):
        evaluate_run(run, "test", FIGURES, CPU, ScoringConfig(similarity=6.0))


@pytest.mark.parametrize("byte", [0, 40, -3, None])
def test_damaged_terms_are_refused_and_made_again(run, without_terms, byte):
    path = run / NEIGHBOURS
    whole = path.read_bytes()
    if byte is None:
        path.unlink()
    else:
        flip_bit(path, byte)
    remedy = rf"`iisan-fast train --resume {run}` makes it again from the run's histories and its cache or features"
    with pytest.raises(InputError, match=rf"neighbours.safetensors: .*; {remedy}"):
        evaluate_run(run, "test", FIGURES, CPU)
    (damage,) = verify_run(run).damage
    assert damage.where == NEIGHBOURS and damage.remedy in remedy
    assert resume(run, CPU) == without_terms[1]
    assert path.read_bytes() == whole and verify_run(run).damage == []


def test_terms_of_a_run_without_checksums_are_read_as_tensors(run):
    (run / "checksums.json").unlink()
    (run / NEIGHBOURS).write_bytes(b"damaged")
    with pytest.raises(InputError, match="neighbours.safetensors: damaged: .* makes it again"):
        load(run, CPU)


def test_terms_of_other_items_are_refused(run, config, tmp_path):
    other = Path(config.dataset)
    folder = shutil.copytree(other, tmp_path / "other")
    users = (folder / "users.tsv").read_text().splitlines()
    (folder / "users.tsv").write_text("\n".join(users[:9]) + "\n")
    train(RunConfig(str(folder), model=ModelConfig("neighbours")), tmp_path / "small", CPU)
    (run / "checksums.json").unlink()
    shutil.copy(tmp_path / "small" / NEIGHBOURS, run / NEIGHBOURS)
    with pytest.raises(InputError, match=r"neighbours.safetensors: expected 40 items, found \d+; `iisan-fast train"):
        load(run, CPU)


# Bad input


def test_similarity_needs_the_states_of_a_cache(config, tmp_path):
    with pytest.raises(InputError, match="similarity: compares states of a cache, and this run of id has none; give a"):
        RunConfig(config.dataset, model=ModelConfig("id"), scoring=ScoringConfig(similarity=1.0))
    with pytest.raises(InputError, match="similarity_dims: compares states of a cache, and this run of id has none"):
        RunConfig(config.dataset, model=ModelConfig("id"), scoring=ScoringConfig(similarity_dims=64))
    encoders = {"uncached": True, "text_encoder": "encoder", "out": tmp_path / "run", "device": "cpu"}
    for method in ("iisan-versa", "lora"):
        with pytest.raises(InputError, match=f"similarity: compares states of a cache, and this run of {method} has"):
            iisan_fast.train(config.dataset, method=method, similarity=6, **encoders)
    assert not (tmp_path / "run").exists()
    train(RunConfig(config.dataset, model=ModelConfig("neighbours")), tmp_path / "plain", CPU)
    with pytest.raises(InputError, match="similarity compares states of a cache, and this run of neighbours has none"):
        iisan_fast.evaluate(tmp_path / "plain", similarity=6, device="cpu")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e7])
@pytest.mark.parametrize("name", ["cooccurrence", "similarity"])
def test_weights_are_finite_and_not_negative(name, value, without_terms):
    for use in (lambda: ScoringConfig(**{name: value}), lambda: iisan_fast.evaluate(without_terms[0], **{name: value})):
        with pytest.raises(InputError, match=rf"{name}: expected 0 to 1000000, found {value}"):
            use()


def test_weights_beside_fit_terms_are_refused(without_terms):
    with pytest.raises(InputError, match="fit_terms: chooses cooccurrence and similarity; leave them out"):
        iisan_fast.evaluate(without_terms[0], cooccurrence=2, fit_terms=True)
    with pytest.raises(InputError, match="fit_terms: chooses cooccurrence and similarity; leave them out"):
        iisan_fast.evaluate(without_terms[0], similarity=0, fit_terms=True)  # 0 is a weight as well


def test_a_grid_without_validation_users_is_refused(without_terms):
    best = load(without_terms[0], CPU)
    none = np.full(len(best.sequences.user_ids), -1)
    sequences = dataclasses.replace(best.sequences, targets={**best.sequences.targets, "validation": none})
    queries = best.user_states("validation")[:0]
    with pytest.raises(InputError, match="fit_terms: expected validation users, found none; give cooccurrence and"):
        Scoring(sequences, best.terms, CPU).fitted(queries, best.item_vectors, FIGURES)


def test_more_dimensions_than_states_have_are_cut_to_those_there_are(with_terms):
    tensors = load_file(with_terms[0] / NEIGHBOURS)
    assert tensors["similarity.mean"].shape == (32,)  # two views of width 16
    assert tensors["similarity.basis"].shape == (32, 32)  # 128 are asked for


def test_pairs_that_come_later_are_not_in_the_terms_of_a_temporal_run(tmp_path):
    """Items x and y are neighbours in every history, but only after the first moment."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    users = [f"u{number}" for number in range(12)]
    items = [*"abcdefxy"]
    (dataset / "items.tsv").write_text("".join(f"{item}\ttitle of {item}\n" for item in items))
    histories = [[items[(user + step) % 6] for step in range(6)] + ["x", "y", "x", "y"] for user in range(len(users))]
    (dataset / "users.tsv").write_text("".join(f"{u}\t{' '.join(h)}\n" for u, h in zip(users, histories)))
    times = "0 1 2 3 4 5 10 11 12 13"
    (dataset / "times.tsv").write_text("".join(f"{user}\t{times}\n" for user in users))
    settings = {"split": "temporal", "validation_from": 0.6, "test_from": 0.8, "device": "cpu"}
    iisan_fast.train(dataset, method="id", embedding_dim=16, epochs=1, out=tmp_path / "run", **settings)
    best = iisan_fast.load(tmp_path / "run", device="cpu")
    matrix = best.terms.cooccurrence
    later = [best.item_ids.index(name) for name in "xy"]
    assert (
        all(matrix.offsets[row] == matrix.offsets[row + 1] for row in later) and not np.isin(matrix.items, later).any()
    )
    assert len(matrix.values) == 30  # each of the others with each
    whole = {**settings, "split": "leave-one-out"}
    del whole["validation_from"], whole["test_from"]
    iisan_fast.train(dataset, method="id", embedding_dim=16, epochs=1, out=tmp_path / "whole", **whole)
    seen = iisan_fast.load(tmp_path / "whole", device="cpu")
    assert np.isin(seen.terms.cooccurrence.items, [seen.item_ids.index(name) for name in "xy"]).any()
