"""Check what `iisan-fast show` prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import iisan_fast as package
from helpers.command_line import iisan_fast, refused


@pytest.fixture(scope="module")
def run(toy_run, tmp_path_factory) -> Path:
    """Return a run of the method neighbours, which takes no training."""
    folder = tmp_path_factory.mktemp("show") / "run"
    package.train(toy_run[0], method="neighbours", out=folder, device="cpu")
    return folder


def test_it_prints_the_path(run, tmp_path):
    result = iisan_fast("show", run, "--out", tmp_path / "page.html", "--users", 2, "--device", "cpu", "-q")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text().count('<article class="user">') == 2


def test_json_has_the_path_and_the_sizes(run):
    result = iisan_fast("show", run, "--users", 3, "--no-pictures", "--device", "cpu", "--json")
    page = run / "report.html"
    expected = {"path": str(page), "size": page.stat().st_size, "users": 3, "pictures": 0, "split": "test"}
    assert json.loads(result.stdout) == expected


def test_bad_input_is_one_line(run, tmp_path):
    assert "not a run folder" in refused("show", tmp_path)
    assert f"{tmp_path / 'no'}: not a run folder" in refused("show", tmp_path / "no")
    assert "expected a file in a folder that exists" in refused("show", run, "--out", tmp_path / "no" / "page.html")
    assert "ends in .html" in refused("show", run, "--out", tmp_path / "page.txt")
    assert "users: expected a number from 0 to 100" in refused("show", run, "--users", 1000)
    assert "dataset: expected a folder" in refused("show", run, "--dataset", tmp_path / "no")
