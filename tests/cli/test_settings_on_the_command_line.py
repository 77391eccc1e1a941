"""Settings from a file, from --set and from options: which one stands, what is refused, and what --dry-run prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import iisan_fast, refused

SMALL = {"model": {"embedding_dim": 16, "bottleneck": 8, "dropout": 0.3}, "train": {"max_epochs": 1, "batch_users": 16}}


def files_in(folder: Path) -> dict[str, int]:
    """Return the times of the last change by name. Reading a cache touches LMDB's lock file, which is left out."""
    paths = [path for path in folder.rglob("*") if path.name != "lock.mdb"]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def settings_file(toy_run, tmp_path) -> Path:
    """YAML that names dataset, cache and all settings of a small run."""
    dataset, cache = toy_run
    path = tmp_path / "small.yaml"
    path.write_text(
        f"dataset: {dataset}\ncache: {cache}\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in SMALL.items())
    )
    return path


def test_a_file_changes_defaults_and_set_and_options_change_the_file(settings_file, tmp_path):
    out = tmp_path / "run"
    changes = ("--set", "model.dropout=0.2", "--set", "model.bottlenecks.first=4", "--seed", 3, "--no-gates")
    result = iisan_fast("train", "--config", settings_file, *changes, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["model"]["dropout"], config["model"]["bottlenecks"]) == (0.2, {"first": 4})
    assert (config["model"]["bottleneck"], config["model"]["blocks"]) == (8, 2)
    assert (config["train"]["seed"], config["train"]["max_epochs"], config["model"]["gates"]) == (3, 1, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "train.max_epochs=2", "--epochs", 3), "--set train.max_epochs, --epochs: are one setting"),
        (("--set", "model.bottleneck=4", "--bottleneck", 8), "--set model.bottleneck, --bottleneck: are one setting"),
        (("--set", "views=[image]", "--views", "title"), "--set views, --views: are one setting"),
        (("there", "--set", "dataset=here"), "--set dataset, DATASET: are one setting"),
        (("--set", "model.droput=0.2"), "model.droput: unknown setting; did you mean model.dropout"),
        (("--set", "dropout=0.2"), "dropout: unknown setting; did you mean model.dropout?"),
        (("--set", "model.dropout"), "--set: expected SECTION.FIELD=VALUE, found 'model.dropout'"),
        (("--set", "model.dropout=2"), "dropout: expected 0 to below 1, found 2"),
        (("--set", "model.dropout=much"), 'model.dropout: expected float, found "much"'),
    ],
)
def test_a_setting_that_cannot_be_used_gets_one_line(settings_file, tmp_path, arguments, message):
    out = tmp_path / "run"
    assert message in refused("train", "--config", settings_file, "--out", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n\tdropout: 0.2\n", "bad.yaml:2: neither YAML nor JSON (found a tab; YAML is indented by spaces)"),
        ("model:\n  droput: 0.2\n", "bad.yaml:2: model.droput: unknown setting; did you mean dropout?"),
        ("model: [1, 2\n", "bad.yaml:"),
        ("3\n", "bad.yaml: expected settings as YAML or JSON"),
    ],
)
def test_a_file_that_cannot_be_used_gets_one_line_with_its_name(toy_run, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    for command in ("train", "extract"):
        assert message in refused(command, toy_run[0], "--cache", toy_run[1], "--config", tmp_path / "bad.yaml")


def test_a_dry_run_of_training_prints_the_plan_and_writes_nothing(settings_file, toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path) | files_in(toy_run[0].parent)
    text = iisan_fast("train", "--config", settings_file, "--epochs", 7, "--dry-run")
    plan = iisan_fast("train", "--config", settings_file, "--epochs", 7, "--dry-run", "--json")
    assert (text.returncode, plan.returncode) == (0, 0), text.stderr
    values = json.loads(plan.stdout)
    assert values["config"]["train"]["max_epochs"] == values["max_epochs"] == 7
    assert values["files"]["folder"] == "runs/toy-1"
    for expected in ("runs/toy-1", "nothing is written", "trained parameters", "metrics.jsonl", "MiB", str(toy_run[0])):
        assert expected in " ".join(text.stdout.split()), expected
    assert f"{values['parameters']['trainable']:,}" in text.stdout
    assert files_in(tmp_path) | files_in(toy_run[0].parent) == before


def test_a_dry_run_still_refuses(settings_file, tmp_path):
    assert "--batch-users: expected" in refused("train", "--config", settings_file, "--dry-run", "--batch-users", 0)
    assert "leave out --dry-run" in refused("train", "--resume", tmp_path, "--dry-run")


def test_extract_takes_a_file_and_changes_and_a_dry_run_writes_nothing(catalogue, encoder_views, tmp_path):
    settings = tmp_path / "encoders.yaml"
    encoders = [{"source": "title", "encoder": str(encoder_views[1].encoder), "layers": [0, 2]}]
    settings.write_text(f"dataset: {catalogue}\nencoders: {json.dumps(encoders)}\nextraction: {{dtype: float16}}\n")
    cache = tmp_path / "states"
    extract = ("extract", "--config", settings, "--cache", cache, "--set", "encoders.title.max_tokens=5")
    for dry_run in ((), ("--dry-run",)):
        message = refused("extract", "--config", settings, "--cache", settings / "states", *dry_run)
        assert f"{settings / 'states'}: cannot be written; {settings} is no folder" in message
    before = files_in(catalogue)
    plan = iisan_fast(*extract, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "to encode" in plan.stdout and "nothing is written" in " ".join(plan.stdout.split())
    counts = json.loads(iisan_fast(*extract, "--dry-run", "--json").stdout)
    assert counts[0]["encoded"] == counts[0]["items"] > 0 and counts[0]["entry_bytes"] > 0
    assert not cache.exists() and files_in(catalogue) == before
    assert iisan_fast(*extract, "--dtype", "float32").returncode == 0
    view = json.loads((cache / "manifest.json").read_text())["views"]["title"]
    assert (view["layers"], view["dtype"], view["max_tokens"]) == ([0, 2], "float32", 5)
    message = refused(*extract, "--set", "extraction.dtype=float16", "--dtype", "float32")
    assert "--set extraction.dtype, --dtype: are one setting" in message
    assert "dataset: none given" in refused("extract", "--cache", cache, "--text-encoder", encoder_views[1].encoder)
