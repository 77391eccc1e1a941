"""The command recommend: a table for a history, JSON lines or files for many users, and one line for each mistake."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import iisan_fast
from helpers.datasets import histories_at_random, make_sequences, write_dataset_folder
from iisan_fast.cli import main
from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.recommendation import recommend
from iisan_fast.serving.trained_model import TrainedModel

polars = pytest.importorskip("polars")

IDS = "with,comma"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the run of the method neighbours on 30 items, one of whose ids has a comma."""
    root = tmp_path_factory.mktemp("recommend")
    dataset = write_dataset_folder(root / "shop", make_sequences(histories_at_random(40, 30), items=30))
    for name in ("users.tsv", "items.tsv"):
        text = (dataset / name).read_text()
        (dataset / name).write_text(
            text.replace("i7\t", f"{IDS}\t").replace("i7 ", f"{IDS} ").replace("i7\n", f"{IDS}\n")
        )
    iisan_fast.train(dataset, method="neighbours", out=root / "run", device="cpu")
    return root / "run"


@pytest.fixture(scope="module")
def expected(run) -> dict[str, list[str]]:
    """Return the ten best items of each user of the dataset."""
    model = TrainedModel.load(run, torch.device("cpu"))
    (part,) = recommend(model, UserHistories.of_run(run))
    ids = np.array(["", *model.catalogue.item_ids])
    return dict(zip(part.user_ids, ids[part.items].tolist()))


def call(*words: object) -> int:
    """Run the command, and return its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(["recommend", *map(str, words)])
    return exit_.value.code


def test_all_users_of_the_dataset_come_as_json_lines(run, expected, capsys):
    assert call(run) == 0
    output = capsys.readouterr()
    objects = [json.loads(line) for line in output.out.splitlines()]
    assert {row["user_id"]: row["items"] for row in objects} == expected
    assert all(row["by_popularity"] is False and row["scores"] == sorted(row["scores"])[::-1] for row in objects)
    assert output.err.splitlines()[-1] == "40 users, 0 by popularity, 0 unknown items"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_users_of_a_file_are_written_into_a_file(run, expected, tmp_path, capsys, caplog, suffix):
    sequences = UserHistories.of_run(run)
    ids = np.array(["", *TrainedModel.load(run, torch.device("cpu")).catalogue.item_ids])
    histories = {user: ids[sequences.part(row, row + 1).items].tolist() for row, user in enumerate(sequences.user_ids)}
    users = tmp_path / "users.jsonl"
    rows = [{"user_id": user, "history": [*history, "gone"]} for user, history in histories.items()]
    users.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"user_id": "new", "history": []}]))
    out = tmp_path / f"best{suffix}"
    assert call(run, "--users", users, "--unknown", "skip", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "users": 41, "by_popularity": 1, "unknown_items": 1}
    assert "found 1 unknown (gone); they are left out" in caplog.text and "1 of 41 users have no history" in caplog.text
    if suffix == ".jsonl":
        items = {row["user_id"]: row["items"] for row in map(json.loads, out.read_text().splitlines())}
    elif suffix == ".csv":
        items = by_user(list(csv.DictReader(out.open(newline=""))))
    else:
        items = by_user(polars.read_parquet(out).to_dicts())
    popular = items.pop("new")
    assert items == expected and len(popular) == 10


def by_user(rows: list[dict]) -> dict[str, list[str]]:
    """Return the item ids of each user, from rows whose ranks count up from 1."""
    items: dict[str, list[str]] = {}
    for row in rows:
        items.setdefault(row["user_id"], []).append(row["item_id"])
        assert int(row["rank"]) == len(items[row["user_id"]])
    return items


def test_a_history_gets_a_table_with_titles_or_json(run, capsys):
    assert call(run, "--history", f"i3, {IDS.split(',')[0]}", "--unknown", "skip", "--top-k", 3, "--json") == 0
    best = json.loads(capsys.readouterr().out)
    assert len(best["items"]) == len(best["scores"]) == 3 and "i3" not in best["items"]
    assert call(run, "--history", "i3", "--top-k", 3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "title of" in line]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert [row[:3] for row in cells] == [[str(n), item, f"title of {item}"] for n, item in enumerate(best["items"], 1)]
    assert [float(row[3]) for row in cells] == pytest.approx(best["scores"], abs=1e-4)


def test_ids_with_commas_are_named_alone(run, capsys):
    assert call(run, "--history", IDS, "--history", "i3,i4", "--top-k", 27, "--json") == 0
    assert not {IDS, "i3", "i4"} & {*json.loads(capsys.readouterr().out)["items"]}
    assert (
        call(
            run, "--history", IDS, "--history", "i3,i4", "--allow", IDS, "--allow", "i3,i5", "--keep-history", "--json"
        )
        == 0
    )
    assert {*json.loads(capsys.readouterr().out)["items"]} == {IDS, "i3", "i5"}


def test_lists_of_allowed_and_denied_items_may_be_files(run, tmp_path, capsys):
    (tmp_path / "allowed.txt").write_text(f"i1\ni2\n{IDS}\ni5\n")
    assert call(run, "--history", "i3", "--allow", tmp_path / "allowed.txt", "--deny", "i1", "--json") == 0
    assert {*json.loads(capsys.readouterr().out)["items"]} == {"i2", IDS, "i5"}
    assert call(run, "--history", "i3", "--allow", tmp_path / "allowed.txt") == 0
    assert "4 of 10 items, because no more are left" in " ".join(capsys.readouterr().out.split())


def test_an_empty_history_gets_the_popular_items_and_says_so(run, capsys, caplog):
    assert call(run, "--history", "") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the most popular items, because the history is empty" in text
    assert "1 of 1 users have no history, and get the most popular items" in caplog.text


WRONG = {
    "--history, --users: expected one of them": ("--history", "i1", "--users", "users.tsv"),
    "k: expected a number from 1 to 30, the items of the catalogue, found 31": ("--history", "i1", "--top-k", "31"),
    "k: expected a number from 1 to 30, the items of the catalogue, found 0": ("--history", "i1", "--top-k", "0"),
    "--history: expected ids of the run's 30 items, found 2 unknown (x, y)": ("--history", "i1,x,y"),
    "--allow: expected item ids of the run, or a file": ("--history", "i1", "--allow", "missing.txt"),
    "deny: expected ids of the run's 30 items, found 1 unknown (x)": ("--history", "i1", "--deny", "x,i1"),
    "allow, deny: expected to leave items": ("--history", "i1", "--deny", "i1,i2", "--allow", "i2"),
    "expected a file named *.jsonl, *.csv, *.parquet, found .xls": ("--history", "i1", "--out", "best.xls"),
    "users.tsv: no such file": ("--users", "users.tsv"),
    "expected a file of users named": ("--users", "users"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_each_mistake_is_one_line(run, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(run, *WRONG[message]) == 2
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and not output.out and not list(tmp_path.iterdir())


def test_a_published_run_without_histories_says_so(run, tmp_path, capsys):
    published = shutil.copytree(run, tmp_path / "run")
    (published / "sequences.npz").unlink()
    assert call(published) == 2
    assert "has no histories of users" in capsys.readouterr().err
    assert call(published, "--history", "i1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 10


def test_a_folder_without_a_run_and_a_run_of_another_format_are_refused(run, tmp_path, capsys):
    assert call(tmp_path) == 2
    assert "not a run folder" in capsys.readouterr().err
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "format": 99}))
    assert call(other, "--history", "i1") == 2
    assert "format" in capsys.readouterr().err
