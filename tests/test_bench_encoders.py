"""The study over encoders: a row a set, by size, and a drawing of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModel

from iisan_fast.bench import cells, encoders
from iisan_fast.bench.cells import SweepSettings
from iisan_fast.cli import cli
from iisan_fast.errors import InputError


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    for module in (cells, encoders):
        monkeypatch.setattr(module, "in_a_process", lambda function, *arguments: function(*arguments))


def test_the_command_sets_sets_of_encoders_side_by_side_and_draws_them(catalogue, encoder_views, tmp_path):
    pytest.importorskip("matplotlib")
    image, title = encoder_views
    pairs = {
        "both": f"source=image encoder={image.encoder}; source=title encoder={title.encoder}",
        "titles": f"source=title encoder={title.encoder}",
    }
    found = CliRunner().invoke(
        cli,
        [
            *("bench", "encoders", str(catalogue), "--folder", str(tmp_path / "sweep"), "--epochs", "1"),
            *("--seeds", "0,1", "--out", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plot.png")),
            *(part for name, views in pairs.items() for part in ("--pair", f"{name}: {views}")),
        ],
        catch_exceptions=False,
    )
    assert found.exit_code == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["encoders"] for row in rows] == ["titles", "both"]  # by size
    models = [AutoModel.from_pretrained(view.encoder) for view in (title, image)]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert [row["encoder_parameters"] for row in rows] == [sizes[0], sum(sizes)]
    assert all(row["seeds"] == 2 and row["encoding_s"] > 0 and row["hr_sd"] is not None for row in rows)
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 1000


def test_an_encoder_of_two_views_counts_once(encoder_views):
    title = encoder_views[1]
    one = encoders.encoder_parameters([title])
    assert encoders.encoder_parameters([title, replace(title, name="mean", pooling="mean")]) == one


def test_the_study_takes_one_method(catalogue, encoder_views, tmp_path):
    settings = SweepSettings(("iisan", "id"), {"titles": (encoder_views[1],)})
    with pytest.raises(InputError, match="methods: expected one, found iisan, id"):
        encoders.benchmark(catalogue, tmp_path / "sweep", settings, torch.device("cpu"))
