"""Extraction's benchmark: the reference gives extraction's states, figures are whole, memory is all processes'."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.command_line import iisan_fast, refused
from iisan_fast import demo
from iisan_fast.benchmarks import extract as bench
from iisan_fast.benchmarks.extract import Measured
from iisan_fast.benchmarks.peak_memory import PeakMemory, descendants, proportional_set_size
from iisan_fast.benchmarks.settings import ExtractSettings
from iisan_fast.benchmarks.tables import NOT_MEASURED
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Write the demo's dataset."""
    return demo.write_demo(tmp_path_factory.mktemp("demo"))[0]


@pytest.mark.parametrize("source", ["title", "image"])
def test_both_forms_give_the_same_states(dataset, tmp_path, source):
    settings = ExtractSettings(items=50, source=source, dtype="float32", batch_size=8, workers=0)
    job = bench.make_job(dataset, settings, CPU, tmp_path)
    measured = {form: bench.run_once(form, job, tmp_path / form) for form in bench.FORMS}
    description = {"dtype": "float32", "encoder_dtype": "float32", "layers": [0, 2, 4, 6], "width": 64}
    states = [bench.read_states(tmp_path / form, job, description) for form in bench.FORMS]
    assert states[0].shape == (50, 4, 64) and len(states[0].unique(dim=0)) > 40
    assert bench.agreement(*states, description)["largest_difference"] <= 1e-5
    assert all(run.seconds > 0 and run.peak_cuda_bytes is None for run in measured.values())


@pytest.mark.parametrize("source", ["title", "image"])
def test_from_memory_the_encoder_takes_what_there_is_room_for(dataset, tmp_path, source, monkeypatch):
    settings = ExtractSettings(items=20, source=source, dtype="float32", batch_size=8, workers=0)
    job = bench.make_job(dataset, settings, CPU, tmp_path)
    taken = []
    load = bench.load_backbone

    def watched(*arguments):
        backbone = load(*arguments)
        encode = backbone.encode
        monkeypatch.setattr(backbone, "encode", lambda inputs: taken.append(inputs) or encode(inputs))
        return backbone

    monkeypatch.setattr(bench, "load_backbone", watched)
    assert bench.run_from_memory(job).items == 20
    assert [len(next(iter(inputs.values()))) for inputs in taken] == [8, 8, 8, 4]  # once to warm up
    taken.clear()
    monkeypatch.setattr(bench, "INPUT_BYTES", 1)
    assert bench.run_from_memory(job).items == 8 and len(taken) == 2


def test_states_that_differ_are_an_error():
    description = {"dtype": "bfloat16", "encoder_dtype": "float32"}
    states = torch.ones(3, 2, 4)
    assert bench.agreement(states, states * 1.001, description)["tolerance"] == 2**-7
    with pytest.raises(InputError, match=r"differ by 1.0e-02 of the largest, expected 7.8e-03"):
        bench.agreement(states, states * 1.01, description)
    assert bench.agreement(states, states * 1.01, description | {"encoder_dtype": "bfloat16"})["tolerance"] == 2e-2
    with pytest.raises(InputError, match="differ by nan"):
        bench.agreement(states, states * torch.nan, description)


def test_a_sample_is_spread_over_the_catalogue(dataset):
    whole = load_dataset(dataset)
    part = bench.sample(whole, 10)
    rows = [whole.sequences.item_ids.index(item_id) for item_id in part.sequences.item_ids]
    assert rows[0] == 0 and rows[-1] == len(whole.titles) - 1 and len(set(rows)) == 10
    assert part.titles == [whole.titles[row] for row in rows]
    assert bench.sample(whole, None).sequences.item_ids == whole.sequences.item_ids
    with pytest.raises(InputError, match="--items 9999: expected at most"):
        bench.sample(whole, 9999)


def test_a_forms_figures():
    runs = [Measured(float(seconds), 100 * seconds, None, 70) for seconds in (1, 2, 3, 4, 5, 6)]
    figures = bench.summary("plain", runs)
    assert (figures["p20_s"], figures["p50_s"], figures["p80_s"]) == (2.0, 3.5, 5.0)
    assert figures["items_per_second"] == 20 and figures["peak_pss_bytes"] == 600
    assert figures["peak_cuda_bytes"] == NOT_MEASURED
    assert bench.summary("plain", [dataclasses.replace(runs[0], peak_cuda_bytes=7)])["peak_cuda_bytes"] == 7


@LINUX
def test_memory_counts_the_process_and_what_it_started():
    program = "import time; room = bytearray(64 << 20); print(flush=True); time.sleep(60)"
    with PeakMemory() as memory:
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert process.pid in descendants(os.getpid())
            alone = proportional_set_size(process.pid)
            memory._look()
            process.kill()
        without = proportional_set_size(os.getpid())
    assert alone >= 64 << 20
    assert memory.bytes >= without + (60 << 20)


def test_the_command_writes_figures_of_both_forms(dataset, tmp_path, in_either_place):
    out = tmp_path / "extract.json"
    options = ("--items", 20, "--rounds", 1, "--batch-size", 8, "--device", "cpu")
    result = iisan_fast("bench", "extract", dataset, *options, "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures == json.loads(out.read_text())
    assert figures["command"].startswith("iisan-fast bench extract DATASET --items=20 --source=title")
    assert {"dataset", "commit", "environment", "view", "notes", "largest_difference", "tolerance"} <= figures.keys()
    assert figures["items"] == 20 and figures["settings"]["workers"] == 0
    plain, fast, from_memory = figures["forms"]
    assert [row["form"] for row in figures["forms"]] == ["plain", "fast", "from memory"]
    assert figures["ratio"] == plain["p50_s"] / fast["p50_s"]
    for row in (plain, fast, from_memory):
        assert row["items"] == 20
        assert len(row["seconds"]) == 1 and row["p20_s"] == row["p50_s"] == row["p80_s"] > 0
        assert row["items_per_second"] == pytest.approx(20 / row["p50_s"])
        assert row["peak_cuda_bytes"] == NOT_MEASURED


def test_the_command_prints_a_table(monkeypatch):
    row = {"p20_s": 1.0, "p50_s": 2.0, "p80_s": 3.0, "items_per_second": 10.0, "peak_cuda_bytes": NOT_MEASURED}
    rows = [{"form": form, "peak_pss_bytes": 5 << 20, **row} for form in bench.FORMS]
    settings = dataclasses.asdict(ExtractSettings(workers=0))
    result = {"settings": settings, "items": 20, "forms": rows}
    monkeypatch.setattr(bench, "compare_extraction", lambda *_: result | {"ratio": 1.0, "largest_difference": 1e-6})
    table = iisan_fast("bench", "extract").stdout
    assert "1.00 / 2.00 / 3.00" in table and "not measured" in table and "plain / fast: 1.00 in time" in table


def test_what_cannot_be_measured_is_refused(dataset, tmp_path):
    assert "expected at most" in refused("bench", "extract", dataset, "--items", 99999)
    assert "no such folder" in refused("bench", "extract", tmp_path / "none")
