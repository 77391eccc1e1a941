"""The commands add-items, update-items and remove-items."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.command_line import iisan_fast, refused
from helpers.growing_runs import NEW, TRAINED, trained_run, write_growing_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_growing_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return a run over titles, which no test changes."""
    return trained_run(data, tmp_path_factory.mktemp("run"), data.views("title"), **{"model.method": "frozen"})


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def counts(result) -> dict:
    assert result.returncode == 0, result.stderr
    return {name: value for name, value in json.loads(result.stdout).items() if name != "run"}


def test_items_are_added_updated_and_removed(data, run, tmp_path, caplog):
    new = tmp_path / "new.tsv"
    new.write_text(data.lines(*data.new_ids()))
    result = iisan_fast("add-items", run, new, "--json")
    assert counts(result) == {"added": NEW, "updated": 0, "removed": 0, "items": TRAINED + NEW}
    assert "encoding" not in caplog.text

    result = iisan_fast("update-items", run, new, "--verbose")
    assert result.returncode == 0 and f"encoding {NEW} items took" in caplog.text
    assert "│ updated" in result.stdout and "│ added" not in result.stdout and f"{TRAINED + NEW}" in result.stdout

    result = iisan_fast("remove-items", run, "i1", "i41", "--json", "--quiet")
    assert counts(result) == {"added": 0, "updated": 0, "removed": 2, "items": TRAINED + NEW - 2}
    ids = tmp_path / "ids.txt"
    ids.write_text("i2\ni3\n")
    assert counts(iisan_fast("remove-items", run, "--from", ids, "--json"))["removed"] == 2


def test_bad_input_is_one_line(data, run, tmp_path):
    new = tmp_path / "new.tsv"
    new.write_text(data.lines("i1", "i2"))
    assert "expected new items, found 2" in refused("add-items", run, new)
    assert "none.tsv: no such file" in refused("add-items", run, tmp_path / "none.tsv")
    assert "not a run folder" in refused("add-items", tmp_path, new)
    assert "found 1 unknown (x)" in refused("remove-items", run, "x")
    assert "give one of the two" in refused("remove-items", run)
    assert "give one of the two" in refused("remove-items", run, "i1", "--from", new)
    assert "no such folder" in refused("add-items", run, new, "--images", tmp_path / "none")
    new.write_text(data.lines("i41"))
    assert "its weights are not those" in refused("add-items", run, new, "--text-encoder", data.image)


PROGRAM = Path(sys.executable).with_name("iisan-fast")


@pytest.mark.long
def test_a_killed_command_leaves_the_run_as_before_or_as_after(data, trained, tmp_path):
    new = tmp_path / "new.tsv"
    new.write_text(data.lines(*data.new_ids()))
    began = time.perf_counter()
    whole = shutil.copytree(trained, tmp_path / "whole")
    subprocess.run([PROGRAM, "add-items", whole, new], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    after = (whole / "catalogue.safetensors").read_bytes()

    generator = np.random.default_rng(0)
    for trial, moment in enumerate(generator.uniform(0.3, 1.1, 12) * seconds):
        run = shutil.copytree(trained, tmp_path / f"run-{trial}")
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        process = subprocess.Popen([PROGRAM, "add-items", run, new], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(moment)
        process.kill()
        process.communicate()
        files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        changed = files.pop("catalogue.safetensors", after)
        assert changed == after and files == before
        if not (run / "catalogue.safetensors").exists():
            subprocess.run([PROGRAM, "add-items", run, new], check=True, capture_output=True)
        assert (run / "catalogue.safetensors").read_bytes() == after
        assert {path.name for path in run.iterdir()} == {*before, "catalogue.safetensors"}
