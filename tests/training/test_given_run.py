"""A run with a given split, from the command line: trained, evaluated, resumed, ranked, shown and published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import iisan_fast
from helpers.command_line import iisan_fast as run_command
from helpers.command_line import refused
from helpers.datasets import histories_in_steps, make_sequences, write_dataset_folder
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.evaluation.metrics import SEVERAL_TARGETS
from iisan_fast.serving.publishing.model_card import model_card
from iisan_fast.serving.report.page import show
from iisan_fast.training.best_run import load
from iisan_fast.training.published_run import write_published

CPU = torch.device("cpu")
OPTIONS = ("--method", "id", "--embedding-dim", "8", "--epochs", "2", "--batch-users", "16", "--device", "cpu")


def command(*arguments: object) -> str:
    """Return what the command prints."""
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def write_dataset(root: Path) -> Path:
    """Write histories of 5 to 13 items: one to three for the test, one for validation, all others of user 7's."""
    histories = histories_in_steps(40, 30)
    write_dataset_folder(root, make_sequences(histories, items=30))
    lines = []
    for number, history in enumerate(histories):
        test = number % 3 + 1
        training = 0 if number == 7 else len(history) - 1 - test
        lines.append(f"u{number}\t{training} {len(history) - training - test} {test}\n")
    (root / "splits.tsv").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("given") / "dataset")


@pytest.fixture(scope="module")
def trained(dataset) -> tuple[Path, dict]:
    """Return the folder of a run that the command trained for two epochs, and the figures that it printed."""
    run = dataset.parent / "run"
    printed = command("train", dataset, "--split", "given", *OPTIONS, "--out", run, "--json")
    return run, json.loads(printed)


def brute_force(run: Path) -> dict[str, float]:
    """Return the run's unmasked test metrics, one user at a time."""
    best = load(run, CPU)
    sequences = best.sequences
    rows = []
    states = best.user_states("test")
    for user in range(len(sequences.user_ids)):
        first, count = sequences.targets["test"][user], sequences.target_counts["test"][user]
        if first < 0:
            continue
        row = int(np.flatnonzero(sequences.split("test").users == user)[0])
        scores = (best.item_vectors @ states[row]).double().numpy()
        order = np.argsort(-scores, kind="stable") + 1
        targets = set(sequences.items[first : first + count].tolist())
        places = [place for place, item in enumerate(order.tolist(), start=1) if item in targets]
        hits = [place for place in places if place <= 10]
        ideal = sum(1 / np.log2(place + 1) for place in range(1, len(places) + 1))
        gain = sum(1 / np.log2(place + 1) for place in hits)
        rows.append((bool(hits), gain / ideal, len(hits) / len(places), 1 / places[0]))
    return dict(zip(("hr@10", "ndcg@10", "recall@10", "mrr"), np.mean(rows, axis=0)))


def test_the_test_figures_are_those_of_a_brute_force_ranking(dataset, trained):
    run, result = trained
    figures = json.loads((run / "test.json").read_text())
    assert result["test"] == figures["test"] and result["epochs"] == 2
    test = figures["test"]
    assert (test["users"], test["targets"]) == (40, 13 * 6 + 1) and test["several_targets"] == SEVERAL_TARGETS
    unmasked = test["unmasked"]
    assert {name: unmasked[name] for name in ("hr@10", "ndcg@10", "recall@10", "mrr")} == pytest.approx(
        brute_force(run), abs=1e-6
    )
    assert figures["popularity"]["targets"] == figures["neighbours"]["targets"] == test["targets"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = lines[0]["validation"]
    assert validation["users"] == 39 and "targets" not in validation
    assert validation["without_history"] == len(histories_in_steps(40, 30)[7]) - 2
    assert "recall@10" not in validation["masked"]


def test_users_with_several_targets_are_encoded_once(trained, monkeypatch):
    best = load(trained[0], CPU)
    split = best.sequences.split("test")
    calls = []
    encode = best.model.user_states
    monkeypatch.setattr(
        best.model, "user_states", lambda vectors, inputs: (calls.append(inputs), encode(vectors, inputs))[1]
    )
    states = best.user_states("test")
    assert [len(inputs) for inputs in calls] == [40]
    torch.testing.assert_close(states, encode(best.item_vectors, split.inputs))


def test_the_command_evaluates_it_and_says_how_targets_count(trained):
    run, result = trained
    assert json.loads(command("evaluate", run, "--json", "--device", "cpu"))["test"] == result["test"]
    printed = " ".join(command("evaluate", run, "--device", "cpu").split())
    assert "percent; 79 test targets of 40 users: 79 warm, 0 cold" in printed
    assert SEVERAL_TARGETS in printed and "RECALL@10" in printed
    printed = " ".join(command("evaluate", run, "--split", "validation", "--device", "cpu").split())
    assert "validation targets of 39 users" in printed and "more are left out, as no interaction comes" in printed
    assert "each user counts once" not in printed and "RECALL" not in printed


def test_the_terms_are_fitted_and_ranked_by_target(trained):
    result = iisan_fast.evaluate(trained[0], device="cpu", fit_terms=True)
    assert (result["test"]["users"], result["test"]["targets"]) == (40, 79)
    weighted = iisan_fast.evaluate(trained[0], device="cpu", cooccurrence=2.0, cold_bias=-1.0)
    assert weighted["test"]["targets"] == 79 and weighted["test"]["masked"] != result["test"]["masked"]


def test_an_untrained_run_counts_in_the_same_way(dataset, tmp_path):
    result = iisan_fast.train(dataset, method="neighbours", split="given", out=tmp_path / "run", device="cpu")
    assert (result["test"]["users"], result["test"]["targets"]) == (40, 79)
    assert "recall@10" in result["test"]["masked"] and result["validation"]["users"] == 39


def test_recommendations_take_the_whole_history(dataset, trained):
    """Recommend for the run's users: no item of training, validation or test is recommended again."""
    lines = command("recommend", trained[0], "--top-k", "3", "--device", "cpu").splitlines()
    recommended = {}
    for line in map(json.loads, lines):
        recommended[line["user_id"]] = set(line["items"])
    histories = dict(line.split("\t") for line in (dataset / "users.tsv").read_text().splitlines())
    assert recommended.keys() == histories.keys() and all(len(items) == 3 for items in recommended.values())
    for user, items in recommended.items():
        assert not items & set(histories[user].split()), user


def test_a_resumed_run_refuses_another_split_of_the_same_histories(dataset, trained, tmp_path):
    moved = write_dataset(tmp_path / "moved")
    text = (moved / "splits.tsv").read_text()
    assert iisan_fast.resume(trained[0], moved, device="cpu")["test"] == trained[1]["test"]
    parts = text.splitlines()[5].split("\t")[1].split(" ")
    changed = f"u5\t{parts[0]} {int(parts[1]) + 1} {int(parts[2]) - 1}"
    (moved / "splits.tsv").write_text(text.replace(text.splitlines()[5], changed))
    with pytest.raises(InputError, match=re.escape("another split (validation, test)")):
        iisan_fast.resume(trained[0], moved, device="cpu")


def test_nothing_is_trained_without_validation_targets(dataset, tmp_path):
    root = write_dataset(tmp_path / "dataset")
    histories = histories_in_steps(40, 30)
    lines = (f"u{number}\t{len(history) - 1} 0 1\n" for number, history in enumerate(histories))
    (root / "splits.tsv").write_text("".join(lines))
    message = refused("train", root, "--split", "given", *OPTIONS, "--out", tmp_path / "run")
    assert "expected validation targets, found none; the best checkpoint is chosen by them" in message
    assert not (tmp_path / "run").exists()


def test_the_page_shows_users_and_their_targets(trained, tmp_path):
    run, result = trained
    show(run, tmp_path / "page.html", device="cpu")
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert "users, 79 targets" in page and SEVERAL_TARGETS in page
    assert "20 users, drawn at random" in page and page.count('<article class="user">') == 20
    assert "of 3 targets" in page and "Targets that are not among them" in page
    assert '<th scope="col">targets</th>' in page and '<th scope="col">users</th>' in page
    accuracy = result["test"]["masked"]["hr@10"]
    assert f'over all 79 test targets: HR@10 is <data value="{accuracy}">' in page


def test_the_model_card_says_how_targets_count(trained, tmp_path):
    (tmp_path / "published").mkdir()
    write_published(trained[0], tmp_path / "published", include_titles=False, include_histories=False)
    card = model_card(tmp_path / "published", "me/given", None)
    assert "The split is given: the dataset says" in card and "Users with fewer than" not in card
    assert f"- 79 targets of 40 users; {SEVERAL_TARGETS}." in card and "RECALL@10" in card


def test_what_is_left_out_stands_in_the_counts(dataset, trained):
    counts = json.loads(command("stats", dataset, "--split", "given", "--json"))
    lost = len(histories_in_steps(40, 30)[7]) - 2
    assert counts["targets_without_history"] == lost and counts["test_users"] == 40
    sequences = load_dataset(dataset, load(trained[0], CPU).config.protocol).sequences
    assert sequences.without_history == {"validation": lost, "test": 0}
