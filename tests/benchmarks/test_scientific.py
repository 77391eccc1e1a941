"""The accuracy benchmark of benchmarks/scientific.py: its configuration is the committed one, and a seed of it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from iisan_fast.benchmarks import scientific
from iisan_fast.config import ProtocolConfig, ViewConfig
from iisan_fast.setting_fields import to_dict

FOLDER = Path(__file__).parents[2] / "benchmarks"


def views(*names: str) -> list[ViewConfig]:
    return [ViewConfig(name, source="title", encoder="encoder", pooling="cls") for name in names]


def test_its_configuration_is_that_of_the_committed_run(tmp_path):
    committed = json.loads((FOLDER / "results" / "scientific-titles-30-tokens.config.json").read_text())
    config = to_dict(scientific.configuration(Path("d"), views("title-cls", "title-mean"), tmp_path, seed=0))
    assert list(config["views"]) == committed["views"]
    for part in ("protocol", "model", "train"):
        assert {name: config[part][name] for name in committed[part]} == committed[part]


@pytest.mark.slow
def test_a_seed_is_trained_to_its_last_epoch_then_to_the_stop(toy_run, tmp_path, monkeypatch):
    dataset, cache = toy_run
    monkeypatch.setattr(scientific, "EPOCHS", 2)
    monkeypatch.setattr(scientific, "PROTOCOL", ProtocolConfig())
    shutil.copytree(cache, tmp_path / "states")
    figures = scientific.run(dataset, views("image", "title"), tmp_path, seed=0)
    assert figures["seed"] == 0 and len(figures["epochs"]) > 2
    for stage in ("within_2_epochs", "to_early_stop"):
        half, best = (figures[stage][kind]["masked"]["hr@10"] for kind in ("test", "test_ties_best"))
        assert 0 <= half <= best <= 1
    again = scientific.run(dataset, views("image", "title"), tmp_path, seed=0)
    assert again["epochs"] == figures["epochs"] and again["to_early_stop"] == figures["to_early_stop"]
