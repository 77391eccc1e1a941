"""The study over encoders: a row a set, by size, and a drawing of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModel

from iisan_fast.benchmarks import cells, encoders
from iisan_fast.benchmarks.harness import Setup
from iisan_fast.benchmarks.sweep_settings import EncodersSettings
from iisan_fast.benchmarks.tables import NOT_MEASURED
from iisan_fast.cli import cli
from iisan_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(cells, "in_a_process", lambda function, *arguments: function(*arguments))


def test_the_command_sets_sets_of_encoders_side_by_side_and_draws_them(catalogue, encoder_views, tmp_path):
    pytest.importorskip("matplotlib")
    image, title = encoder_views
    pairs = {
        "both": f"source=image encoder={image.encoder}; source=title encoder={title.encoder}",
        "titles": f"source=title encoder={title.encoder}",
    }
    result = CliRunner().invoke(
        cli,
        [
            *("bench", "encoders", str(catalogue), "--folder", str(tmp_path / "sweep"), "--epochs", "1"),
            *("--seeds", "0,1", "--out", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plot.png")),
            *(part for name, views in pairs.items() for part in ("--pair", f"{name}: {views}")),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["encoders"] for row in rows] == ["titles", "both"]  # by size
    models = [AutoModel.from_pretrained(view.encoder) for view in (title, image)]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert [row["encoder_parameters"] for row in rows] == [sizes[0], sum(sizes)]
    assert all(row["seeds"] == 2 and row["encoding_s"] > 0 and row["hr_sd"] is not None for row in rows)
    assert all(list(row["baselines"]) == ["popularity", "neighbours"] for row in rows)
    similar = rows[0]["baselines"]["neighbours"], rows[1]["baselines"]["neighbours"]
    assert similar[0] != similar[1]  # by the states of each set
    assert "neighbours" in result.output and "popularity" in result.output
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 1000


def test_the_drawing_shows_every_row(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    names = ("encoders", "encoder_parameters", "hr", "hr_sd", "ndcg", "ndcg_sd", "epoch_s", "encoding_s")
    rows = [("small", 2e6, 0.25, 0.125, 0.5, None, 3, 10), ("large", 4e6, 0.75, None, 0.625, 0.25, 5, NOT_MEASURED)]
    result = {"dataset": "d", "settings": {"methods": ["iisan"], "seeds": [0]}}
    encoders.draw({**result, "rows": [dict(zip(names, row)) for row in rows]}, tmp_path / "plot.png")
    accuracy, cost = figures[0].axes
    drawn = [(bars.get_label(), bars.lines[0].get_xydata().tolist()) for bars in accuracy.containers]
    assert drawn == [("HR@10", [[2, 25], [4, 75]]), ("NDCG@10", [[2, 50], [4, 62.5]])]
    spans = [[part[:, 1].tolist() for part in bars.lines[2][0].get_segments()] for bars in accuracy.containers]
    assert spans == [[[12.5, 37.5], [75, 75]], [[50, 50], [37.5, 87.5]]]
    assert [(text.get_text(), text.xy) for text in accuracy.texts] == [("small", (2, 25)), ("large", (4, 75))]
    assert [line.get_xydata().tolist() for line in cost.lines] == [[[2, 3], [4, 5]], [[2, 10]]]


def test_names_of_encoders_of_one_size_do_not_meet(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    figure = {"hr_sd": None, "ndcg": 0.1, "ndcg_sd": None, "epoch_s": 1, "encoding_s": NOT_MEASURED}
    sizes = {"few layers": (2e6, 0.251), "all layers": (2e6, 0.25), "larger": (4e6, 0.25)}
    rows = [{"encoders": name, "encoder_parameters": size, "hr": hr, **figure} for name, (size, hr) in sizes.items()]
    result = {"dataset": "d", "settings": {"methods": ["iisan"], "seeds": [0]}, "rows": rows}
    encoders.draw(result, tmp_path / "plot.png")
    accuracy = figures[0].axes[0]
    boxes = [text.get_window_extent(figures[0].canvas.get_renderer()) for text in accuracy.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert boxes[0].y0 > boxes[1].y0  # as their HR
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["2", "4"]


def test_an_encoder_of_two_views_counts_once(encoder_views):
    title = encoder_views[1]
    one = encoders.encoder_parameters([title])
    assert encoders.encoder_parameters([title, replace(title, name="mean", pooling="mean")]) == one


def test_the_study_takes_one_method(catalogue, encoder_views, tmp_path):
    settings = EncodersSettings(("iisan", "id"), {"titles": (encoder_views[1],)})
    with pytest.raises(InputError, match="methods: expected one, found iisan, id"):
        encoders.compare_encoders(Setup(catalogue, CPU, tmp_path / "sweep"), settings)
