"""The example of the whole way runs in small: each of its steps leaves what it says."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import iisan_fast
from helpers.growing_runs import NEW, TRAINED, write_growing_data
from iisan_fast import IISAN

EXAMPLE = Path(__file__).parents[2] / "examples" / "scientific.py"


@pytest.mark.slow
@pytest.mark.parametrize("exports", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_example_trains_recommends_adds_exports_and_shows(tmp_path, monkeypatch, capsys, exports):
    """Run the example; the export to ONNX takes half of the time, and stands in the long test alone."""
    if not exports:
        monkeypatch.setattr(
            "iisan_fast.serving.exports.exporting.export",
            lambda run, folder, *_: SimpleNamespace(folder=folder, files={}),
        )
    data = write_growing_data(tmp_path / "data")
    out = tmp_path / "out"
    arguments = [str(data.dataset), str(data.text), str(out), "--cache", str(tmp_path / "states")]
    arguments += ["--epochs", "2", "--max-tokens", "30"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    titles = {line.split("\t")[1] for line in (data.dataset / "items.tsv").read_text().splitlines()}
    blocks = printed.split("\n\n")
    assert blocks[0] == f"60 users, {TRAINED} items" and blocks[1].count("validation HR@10") == 2
    users = [block for block in blocks if block.startswith("user ")]
    assert len(users) == 5
    for block in users:
        history, recommended = block.split("   and may like\n")
        shown = [line.strip().rpartition("  (")[0] for line in recommended.splitlines()]
        assert len(shown) == 5 and all(is_start_of(title, titles) for title in shown)
        assert all(is_start_of(line.strip(), titles) for line in history.splitlines()[1:])
    assert sum(block.startswith("new: ") for block in blocks) == 3 <= NEW

    model = IISAN.load(out / "run", device="cpu")
    assert model.trained.catalogue.item_ids[TRAINED:] == data.new_ids()[:3]
    assert iisan_fast.verify(out / "run").damage == []
    assert f"{model.figures['test']['masked']['hr@10']:.2%}" in printed
    assert f"exported to {out / 'exported'}: " in printed
    assert (out / "exported" / "sequence_encoder.onnx").exists() == exports == ("item_vectors.npy" in printed)
    assert "<html" in (out / "report.html").read_text()[:300]


def is_start_of(shown: str, titles: set[str]) -> bool:
    """Return True if a shown title, which may be cut, is the start of a title."""
    return any(title.startswith(shown.removesuffix(" …")) for title in titles)
