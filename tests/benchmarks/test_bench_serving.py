"""The benchmark of serving: every part has its figures, forms that disagree are an error, and goals are judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.command_line import iisan_fast, refused
from helpers.growing_runs import trained_run, write_growing_data
from helpers.run_folders import flip_bit
from iisan_fast.benchmarks import made_catalogue, serving, serving_changes, serving_parts
from iisan_fast.benchmarks.catalogue import BY_NAME
from iisan_fast.errors import InputError
from iisan_fast.serving.recommendation import recommend

CPU = torch.device("cpu")
SMALL = ("--rounds", 2, "--latency-users", 3, "--added", 2, "--made-items", 50, "--made-users", 20, "--device", "cpu")


NOT_HERE = "export: onnx not installed; pip install 'iisan-fast[export]'"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run of one epoch over titles, with both terms."""
    root = tmp_path_factory.mktemp("serving")
    data = write_growing_data(root)
    return trained_run(data, root, data.views("title"), **{"scoring.cooccurrence": 2.0, "scoring.similarity": 9.0})


@pytest.fixture(scope="module")
def figures(run, tmp_path_factory) -> dict:
    """Return the result of the command, without processes, and without an export, which takes many seconds."""

    def refused_export(*_: object) -> dict:
        raise InputError(NOT_HERE)

    out = tmp_path_factory.mktemp("result") / "serving.json"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "in_a_process", lambda function, *arguments: function(*arguments))
        patch.setitem(serving_changes.CHANGES, "export", refused_export)
        result = iisan_fast("bench", "serving", run, *SMALL, "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert json.loads(result.stdout) == json.loads(out.read_text())
    return json.loads(result.stdout)


def test_the_command_gives_the_figures_of_every_part(figures):
    command = "iisan-fast bench serving RUN --rounds=2 --latency-users=3 --added=2 --made-items=50 --made-users=20"
    assert figures["command"] == command and figures["dataset"] == "dataset"
    assert (figures["run"]["users"], figures["run"]["items"]) == (60, 40)
    for row in (figures["loading"], *figures["recommending"], figures["made"]):
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["cpu_s"] > 0 and row["peak_pss_bytes"] > 1 << 20
    weights = {row["form"]: row["weights"]["similarity"] for row in figures["recommending"]}
    assert weights == {"run": 9.0, "no_terms": 0.0, "with_history": 9.0}
    assert figures["made"]["cooccurrence_entries"] == 500
    assert 0 < figures["latency"]["p50_ms"] <= figures["latency"]["p99_ms"]
    auto, reference = figures["forms"]["rows"]
    assert (auto["form"], reference["form"]) == ("auto", "reference")
    assert figures["forms"]["ratio"] == pytest.approx(reference["p50_s"] / auto["p50_s"])
    assert figures["export"] == {"not_measured": NOT_HERE}
    (added,) = figures["added"]["rows"]
    assert added["items"] == 2 and added["p50_s"] > 0 and added["cpu_s"] > 0
    assert figures["page"]["users"] == 20 and figures["page"]["bytes"] > 10_000
    assert figures["goals"]["all_users_met"] is None and figures["goals"]["made_bytes_met"] is None


def test_a_result_is_shown_with_a_row_for_each_part(figures):
    (table,) = BY_NAME["serving"].tables(figures)
    parts = [table.columns[0].text(row) for row in table.sections[0]]
    assert parts[:2] == ["load the run", "recommend, run"] and parts[-3:] == ["50 made items", "add 2 items", "page"]
    assert all(column.text(row) is not None for column in table.columns for row in table.sections[0])
    assert table.title == "dataset, iisan, 60 users, 40 items" and NOT_HERE in table.caption


def test_forms_that_disagree_are_an_error():
    rows = torch.tensor([[3, 1, 2], [0, -1, -1]])
    scores = torch.tensor([[9.0, 4.0, 4.0 - 1e-6], [2.0, -torch.inf, -torch.inf]])
    swapped = rows.clone()
    swapped[0, 1:] = torch.tensor([2, 1])
    same = serving_parts.agreement((swapped, scores), (rows, scores))
    assert same == {"same_items_users": 1, "largest_score_difference": 0.0}
    with pytest.raises(InputError, match="differ by 1.1e-01 of the largest"):
        serving_parts.agreement((rows, scores - 1), (rows, scores))
    missing = scores.clone()
    missing[0, 2] = -torch.inf
    with pytest.raises(InputError, match="leave out different numbers of items"):
        serving_parts.agreement((rows, missing), (rows, scores))


@pytest.mark.parametrize(
    ("seconds", "peak", "expected"),
    [(1.9, 1_900_000_000, (True, True)), (2.1, 2_000_000_001, (False, False)), (1.0, "not measured", (True, None))],
)
def test_goals_are_judged_at_their_sizes_alone(seconds, peak, expected):
    run = {"users": 12_076, "items": 20_314}
    catalogue = {"items": 1_000_000, "users": 10_000, "peak_pss_bytes": peak}
    figures = {"run": run, "recommending": [{"p50_s": seconds}, {"p50_s": 99.0}], "made": catalogue}
    judged = serving.goals(figures)
    assert (judged["all_users_met"], judged["made_bytes_met"]) == expected
    small = serving.goals({**figures, "run": {**run, "users": 60}, "made": {**catalogue, "items": 50}})
    assert small["all_users_met"] is None and small["made_bytes_met"] is None


def test_a_made_catalogue_is_ranked_as_a_sort_of_all_scores_ranks_it():
    model = made_catalogue.made_model(300, CPU)
    histories = made_catalogue.made_histories(300, 7)
    (part,) = recommend(model, histories, 10)
    scores = model.scores(histories)
    dense = scores.queries @ scores.vectors.T
    added = scores.added(np.arange(7))
    dense[added.users(), added.items] += added.values
    for user in range(7):
        dense[user, histories.part(user, user + 1).items - 1] = -torch.inf
    values, rows = dense.sort(dim=1, descending=True, stable=True)
    assert np.array_equal(part.items, rows[:, :10].numpy() + 1)
    np.testing.assert_allclose(part.scores, values[:, :10].numpy(), rtol=1e-5)


def test_neighbours_of_a_made_catalogue_ascend_and_are_different():
    matrix = made_catalogue.made_cooccurrence(1000)
    columns = matrix.items.reshape(1000, 10)
    assert (np.diff(columns, axis=1) > 0).all() and columns.min() >= 0 and columns.max() < 1000
    assert len(np.unique(columns)) > 990 and (matrix.values > 0).all() and matrix.offsets[-1] == 10_000


@pytest.mark.long
def test_every_part_runs_in_a_process_of_its_own(run):
    result = iisan_fast("bench", "serving", run, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["export"]["p50_s"] > 0 and figures["page"]["p50_s"] > 0 and figures["made"]["peak_pss_bytes"] > 0


@pytest.mark.long
@pytest.mark.parametrize("is_installed", [True, False])
def test_an_export_has_sizes_and_the_recall_of_its_index_if_there_is_a_library(run, monkeypatch, is_installed):
    monkeypatch.setattr(serving_changes, "find_spec", lambda name: is_installed or None)
    figures = serving_changes.exporting(run, serving.ServingSettings(), CPU)
    assert figures["bytes"] == sum(figures["files"].values()) > figures["files"]["item_vectors.npy"] >= 40 * 64 * 4
    assert set(figures["compared"]) >= {"sequence_encoder"} and figures["p50_s"] > 0
    if is_installed:
        assert figures["index"]["kind"] == "faiss" and figures["index"]["recall"] > 0.9
    else:
        assert figures["index"] == {"not_measured": serving_changes.NO_INDEX}


def test_a_part_that_cannot_be_measured_has_the_reason(in_this_process):
    def part(name: str) -> dict:
        raise InputError(f"{name}: pip install 'iisan-fast[faiss]'")

    assert serving.measured_or_reason(part, "index") == {"not_measured": "index: pip install 'iisan-fast[faiss]'"}
    assert serving.measured_or_reason(lambda: {"seconds": 1}) == {"seconds": 1}


def test_bad_input_gets_one_line(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for path in run.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert "none: not a run folder" in refused("bench", "serving", tmp_path / "none", "--device", "cpu")
    assert "--made-items" in refused("bench", "serving", run, "--made-items", 5, "--device", "cpu")
    flip_bit(copy / "sequences.npz", 100)
    assert "sequences.npz" in refused("bench", "serving", copy, *SMALL)


def test_without_terms_the_model_alone_ranks(run):
    model = serving_parts.TrainedModel.load(run, CPU)
    histories = serving_parts.dataset_histories(run)
    (with_terms,) = recommend(model, histories)
    (without,) = recommend(serving_parts.without_terms(model), histories)
    assert (with_terms.items != without.items).any()
    dense = model.user_states(histories) @ model.catalogue.vectors.T
    for user in range(60):
        dense[user, histories.part(user, user + 1).items - 1] = -torch.inf
    np.testing.assert_allclose(without.scores, dense.sort(dim=1, descending=True).values[:, :10].numpy(), rtol=1e-5)
