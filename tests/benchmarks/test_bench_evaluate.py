"""Evaluation's benchmark: argsort's ranks are those of counting, figures are whole, what is scaled says so."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from helpers.command_line import iisan_fast, refused
from iisan_fast.benchmarks import evaluate as bench
from iisan_fast.benchmarks.dense import DenseModel
from iisan_fast.benchmarks.evaluate import Evaluated
from iisan_fast.benchmarks.machine import demo_sequences
from iisan_fast.benchmarks.settings import EvaluateSettings
from iisan_fast.benchmarks.tables import NOT_MEASURED
from iisan_fast.config import EvaluationConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.evaluation.metrics import ranking_metrics, target_ranks
from iisan_fast.states.feature_table import FeatureTable

CPU = torch.device("cpu")
SMALL = EvaluateSettings(width=24, layers=3, argsort_users=30)
SMALL_OPTIONS = ("--width", 24, "--layers", 3, "--rounds", 2, "--device", "cpu")


@pytest.fixture(scope="module", params=["test", "validation"])
def inputs(request) -> bench.EvaluationInputs:
    return bench.make_inputs(demo_sequences(), dataclasses.replace(SMALL, split=request.param), CPU)


def test_both_forms_find_the_same_vectors_and_states(inputs):
    form = DenseModel(inputs.model, list(inputs.table.views))
    with torch.no_grad():
        vectors = form.item_vectors(torch.arange(1, inputs.table.rows))
        states = bench.dense_states(form, vectors, torch.from_numpy(inputs.split.inputs))
    ours = inputs.model.catalogue_vectors(inputs.table)
    torch.testing.assert_close(ours, vectors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inputs.model.user_states(ours, inputs.split.inputs), states, rtol=1e-4, atol=1e-5)
    assert len(states) == len(inputs.split.targets) and len(vectors.unique(dim=0)) == len(vectors)


def test_argsort_ranks_are_those_of_counting(inputs):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(inputs.split.targets), 8, generator=generator, dtype=torch.float64)
    vectors = torch.randn(inputs.table.rows - 1, 8, generator=generator, dtype=torch.float64)
    masked, _ = target_ranks(states, vectors, inputs.split, EvaluationConfig())
    users = np.flatnonzero(inputs.split.reachable)[:200]
    assert (bench.argsort_ranks(states, vectors, inputs.split, users) == masked[users]).all()
    assert (masked[users] != target_ranks(states, vectors, inputs.split, EvaluationConfig())[1][users]).any()


def test_a_target_in_its_own_history_comes_last_by_argsort(toy_run):
    inputs = bench.make_inputs(load_dataset(toy_run[0]).sequences, SMALL, CPU)
    split = inputs.split
    split.items[split.ends[7] - 1] = split.targets[7]
    states, vectors = torch.randn(len(split.targets), 4), torch.randn(40, 4)
    rank = bench.argsort_ranks(states, vectors, split, np.array([7]))
    history_items = len(set(split.history[7].tolist()) - {0})
    assert 40 - history_items < rank[0] <= 40
    assert target_ranks(states, vectors, split, EvaluationConfig())[0][7] == np.inf


def test_the_forms_agree_and_name_their_stages(inputs):
    dense, fast = (run(inputs) for run in bench.FORMS.values())
    assert dense.ranks.shape == (30,) and fast.ranks.shape == (1600,)
    assert set(bench.EVALUATION["dense"]) == dense.seconds.keys()
    assert set(bench.EVALUATION["fast"]) | {"ranking"} == fast.seconds.keys()
    assert all(seconds > 0 for seconds in (*dense.seconds.values(), *fast.seconds.values()))
    agreement = bench.agreement(dense, fast, inputs)["agreement"]
    assert agreement["users"] == 30 and agreement["largest_rank_difference"] <= agreement["rank_tolerance"]
    assert agreement["hr@10"]["dense"] == dense.metrics["hr@10"]
    assert fast.metrics["hr@10"] == ranking_metrics(fast.ranks, (10,))["hr@10"]


def test_the_form_with_terms_ranks_as_the_sum_of_all_scores_does(inputs):
    terms = bench.with_terms(inputs)
    assert terms.seconds.keys() == bench.fast(inputs).seconds.keys()
    with torch.inference_mode():
        vectors = inputs.model.catalogue_vectors(inputs.table)
        states = inputs.model.user_states(vectors, inputs.split.inputs)
        scores = inputs.terms.scored(states, vectors, inputs.split.history, 2.0, 9.0)
        added = scores.added(np.arange(len(states)))
        dense = scores.queries.double() @ scores.vectors.double().T
        dense[added.users(), added.items] += added.values.double()
        masked, _ = target_ranks(dense, torch.eye(len(vectors)).double(), inputs.split, EvaluationConfig())
    reached = np.isfinite(masked)
    assert (np.abs(terms.ranks[reached] - masked[reached]) <= 2).all() and (~reached == np.isinf(terms.ranks)).all()
    assert (terms.ranks != bench.fast(inputs).ranks).mean() > 0.5


def test_the_form_for_cuda_evaluates_the_states_as_a_run_holds_them(inputs):
    assert all(view.dtype == torch.bfloat16 for view in inputs.trained_table.views)
    nothing = FeatureTable(tuple(torch.zeros_like(view) for view in inputs.table.views))
    narrow = bench.bfloat16(dataclasses.replace(inputs, table=nothing))
    fast = bench.fast(inputs)
    assert narrow.metrics == fast.metrics and np.array_equal(narrow.ranks, fast.ranks)  # on a CPU both are bf16
    assert not np.array_equal(bench.fast(dataclasses.replace(inputs, table=nothing)).ranks, fast.ranks)
    assert all(stage in narrow.seconds for stage in bench.EVALUATION["bfloat16"])


def test_forms_that_disagree_are_an_error(inputs):
    dense, fast = (run(inputs) for run in bench.FORMS.values())
    ranks = dense.ranks.copy()
    ranks[np.isfinite(fast.ranks[inputs.sample]).argmax()] += 5
    with pytest.raises(InputError, match=r"ranks differ by up to \d, expected at most 2"):
        bench.agreement(Evaluated(ranks, dense.metrics, {}), fast, inputs)
    ranks[:] = np.nan
    with pytest.raises(InputError, match="ranks differ by up to nan"):
        bench.agreement(Evaluated(ranks, dense.metrics, {}), fast, inputs)
    wrong = dense.metrics | {"ndcg@10": dense.metrics["ndcg@10"] + 0.1}
    with pytest.raises(InputError, match=r"ndcg@10: .* by argsort, .* expected them within 0.034"):
        bench.agreement(Evaluated(dense.ranks, wrong, {}), fast, inputs)


def test_only_the_rankings_part_of_the_time_is_scaled():
    runs = [{"item_vectors": 1.0, "user_states": 2.0, "ranking": float(seconds)} for seconds in (1, 2, 3, 4, 5, 6)]
    part = bench.part_summary([3.0] * 6, [run["ranking"] for run in runs], ranked=10, users=40)
    assert (part["p20_s"], part["p50_s"], part["p80_s"]) == (5.0, 6.5, 8.0) and part["measured_users"] == 10
    assert part["all_users"] == {"p20_s": 11.0, "p50_s": 17.0, "p80_s": 23.0, "scaled": True}
    assert part["users_per_second"] == 40 / 17
    whole = bench.part_summary([3.0] * 6, [1.0] * 6, ranked=40, users=40)
    assert whole["all_users"] == {"p20_s": 4.0, "p50_s": 4.0, "p80_s": 4.0, "scaled": False} and whole["p50_s"] == 4.0


def test_a_forms_summary_adds_up_its_stages(inputs):
    run = {"item_vectors": 1.0, "user_states": 2.0, "ranking_and_metrics": 4.0, "ranking": 3.0}
    fast = bench.summary("fast", [run, run], inputs)
    assert fast["evaluation"]["p50_s"] == 7.0 and fast["ranking"]["p50_s"] == 3.0
    assert not fast["evaluation"]["all_users"]["scaled"] and fast["stages"]["user_states"]["p80_s"] == 2.0
    dense = bench.summary("dense", [{"item_vectors": 1.0, "user_states": 2.0, "ranking": 3.0}], inputs)
    assert dense["evaluation"]["p50_s"] == 6.0 and dense["evaluation"]["all_users"]["p50_s"] == 3 + 3 * 1600 / 30


def test_how_many_users_are_sorted():
    chosen = {None: 2000, 0: 12_076, 5: 5}
    for asked, expected in chosen.items():
        assert bench.argsort_users(EvaluateSettings(argsort_users=asked), "d", 12_076) == expected
    assert bench.argsort_users(EvaluateSettings(), "d", 60) == 60
    with pytest.raises(InputError, match="--argsort-users 61: expected at most 60, the users of d"):
        bench.argsort_users(EvaluateSettings(argsort_users=61), "d", 60)


def test_the_sample_is_spread_over_all_users(inputs):
    assert inputs.sample[0] == 0 and inputs.sample[-1] == 1599 and len(set(inputs.sample)) == 30


def test_the_command_writes_figures_of_both_forms(toy_run, tmp_path, in_this_process):
    out = tmp_path / "evaluate.json"
    options = (*SMALL_OPTIONS, "--argsort-users", 20, "--split", "validation")
    result = iisan_fast("bench", "evaluate", toy_run[0], *options, "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures == json.loads(out.read_text())
    command = "iisan-fast bench evaluate DATASET --split=validation --width=24 --layers=3 --argsort-users=20 --rounds=2"
    assert figures["command"] == f"{command} --seed=0"
    assert {"dataset", "commit", "environment", "notes", "agreement"} <= figures.keys()
    assert figures["users"] == 60 and figures["catalogue"] == 40 and figures["ratios_scaled"]
    dense, fast, terms = figures["forms"]
    assert (dense["form"], fast["form"], terms["form"]) == ("dense", "fast", "terms")
    for row in (dense, fast, terms):
        assert row["peak_cuda_bytes"] == NOT_MEASURED and row["peak_pss_bytes"] != 0
        for part in ("ranking", "evaluation"):
            assert 0 < row[part]["p20_s"] <= row[part]["p50_s"] <= row[part]["p80_s"]
            assert row[part]["users_per_second"] == pytest.approx(60 / row[part]["all_users"]["p50_s"])
            assert row[part]["measured_users"] == (20 if row is dense else 60)
            assert row[part]["all_users"]["scaled"] == (row is dense)
    for part, ratio in figures["ratios"].items():
        assert ratio == pytest.approx(dense[part]["all_users"]["p50_s"] / fast[part]["all_users"]["p50_s"])
    for part, ratio in figures["terms_ratios"].items():
        assert ratio == pytest.approx(terms[part]["p50_s"] / fast[part]["p50_s"])


def test_all_users_may_be_sorted(toy_run, in_this_process):
    result = iisan_fast("bench", "evaluate", toy_run[0], *SMALL_OPTIONS, "--argsort-users", 0, "--json")
    figures = json.loads(result.stdout)
    assert figures["settings"]["argsort_users"] == 60 and not figures["ratios_scaled"]
    assert not figures["forms"][0]["evaluation"]["all_users"]["scaled"]


def test_the_command_prints_a_table(toy_run, in_either_place):
    result = iisan_fast("bench", "evaluate", toy_run[0], *SMALL_OPTIONS, "--argsort-users", 20)
    assert result.returncode == 0, result.stderr
    assert "60 users of toy, 40 items" in result.stdout and "(scaled)" in result.stdout
    assert "dense / fast (scaled): " in result.stdout and "not measured" in result.stdout
    assert "terms / fast: " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_bad_options_get_one_line(toy_run, tmp_path):
    command = ("bench", "evaluate", toy_run[0], "--device", "cpu")
    assert "--argsort-users 61: expected at most 60, the users of toy" in refused(*command, "--argsort-users", 61)
    assert "--argsort-users" in refused(*command, "--argsort-users", -1)
    assert "--split" in refused(*command, "--split", "train")
    assert "--rounds" in refused(*command, "--rounds", 0)
    assert "folder that exists" in refused(*command, "--out", tmp_path / "none" / "result.json")
    assert "no such folder" in refused("bench", "evaluate", tmp_path / "nowhere", "--device", "cpu")
