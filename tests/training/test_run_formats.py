"""Check the format numbers of runs and caches; runs of format 1 open, train and evaluate too.

tests/format_1 holds files that a version without format numbers wrote: a dataset, a cache, a run stopped after two of
its three epochs, what `evaluate` printed for it, the test figures of the same run without a stop, and the beginning of
a run whose side network multiplied in bfloat16 on a CPU.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command_line import refused
from helpers.run_folders import untimed, without_later_figures
from iisan_fast.config import EvaluationConfig
from iisan_fast.errors import InputError
from iisan_fast.settings_files import RUN_FORMAT, read_run_config, read_run_settings
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_environment import environment
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train

FORMAT_1 = Path(__file__).parents[1] / "format_1"
CPU = torch.device("cpu")
ONE_USER = 1 / 60  # one of the dataset's 60 users, if rounding moves the target over the cut-off


@pytest.fixture
def old(tmp_path) -> Path:
    """Copy the folder format_1; its runs name the copied dataset and cache."""
    root = Path(shutil.copytree(FORMAT_1, tmp_path / "old"))
    for name in ("run", "bfloat16-run"):
        path = root / name / "config.json"
        settings = json.loads(path.read_text())
        assert "format" not in settings
        path.write_text(json.dumps({**settings, "dataset": str(root / "dataset"), "cache": str(root / "cache")}))
    return root


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_format(run: Path, number: Any) -> None:
    """Write another format number into a run's config.json; "absent" removes it."""
    settings = json.loads((run / "config.json").read_text())
    settings.pop("format", None)
    (run / "config.json").write_text(json.dumps(settings if number == "absent" else {"format": number, **settings}))


def assert_close(result: Any, expected: Any, tolerance: float) -> None:
    """Check that two JSON values agree: numbers within an absolute tolerance, everything else exactly."""
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(result[name], value, tolerance)
    elif isinstance(expected, float):
        assert result == pytest.approx(expected, abs=tolerance)
    else:
        assert result == expected


# Of format 1


def test_a_run_of_format_1_is_evaluated_to_the_same_figures_and_stays_as_it_is(old):
    before = everything(old / "run")
    figures = evaluate_run(old / "run", "test", EvaluationConfig(), CPU)
    assert_close(without_later_figures(figures), json.loads((old / "evaluated.json").read_text()), 1e-9)
    assert figures["neighbours"]["similarity"] and not any(figures["scoring"].values())
    assert load(old / "run", CPU).epoch == 2
    assert everything(old / "run") == before


def test_a_run_of_format_1_goes_on_to_the_figures_of_one_that_was_not_stopped(old):
    begun = untimed(old / "run")
    figures = resume(old / "run", CPU)
    # The run was trained on another processor, so the third epoch may round otherwise.
    expected = json.loads((old / "resumed-test.json").read_text())
    assert_close(without_later_figures(figures), expected, 1.01 * ONE_USER)
    assert len(begun) == 2 and untimed(old / "run")[:2] == begun
    assert json.loads((old / "run" / "test.json").read_text()) == figures


def test_a_new_run_trains_on_a_cache_of_format_1_to_the_same_losses(old):
    assert json.loads((old / "cache" / "manifest.json").read_text())["format"] == 1
    train(read_run_config(old / "run" / "config.json"), old / "new", CPU)
    expected = [line["loss"] for line in untimed(old / "run")]
    assert [line["loss"] for line in untimed(old / "new")][:2] == pytest.approx(expected, rel=1e-5)


def test_a_run_made_with_bfloat16_products_on_a_cpu_is_refused_on_resume_in_one_line(old):
    before = everything(old)
    assert refused("train", "--resume", old / "bfloat16-run", "--device", "cpu") == (
        f"error: {old / 'bfloat16-run'}: precision: expected auto or float32 for iisan on a CPU, found bfloat16; "
        "train a run in float32, or choose the device cuda\n"
    )
    assert everything(old) == before


@pytest.mark.parametrize(
    ("recorded", "current_name"), [("torch", "reference"), ("host", "host"), ("native", "cpu"), ("triton", "gpu")]
)
def test_the_forms_that_a_run_of_format_1_records_are_renamed(old, recorded, current_name):
    path = old / "run" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kernels": recorded}))
    assert RunFolder.open(old / "run").environment["kernels"] == current_name
    assert json.loads(path.read_text())["kernels"] == recorded
    set_format(old / "run", 2)
    assert RunFolder.open(old / "run").environment["kernels"] == recorded


def test_a_run_of_format_1_goes_on_with_one_warning_where_the_same_form_runs(old, caplog):
    names = {"reference": "torch", "cpu": "native", "gpu": "triton"}
    now = environment(CPU)
    (old / "run" / "environment.json").write_text(json.dumps({**now, "kernels": names[now["kernels"]]}))
    with caplog.at_level(logging.WARNING):
        resume(old / "run", CPU)
    messages = [record.getMessage() for record in caplog.records if "without checksums" not in record.getMessage()]
    assert messages == [
        f"{old / 'run'}: has no checksums, so damage may stay unseen; `iisan-fast verify {old / 'run'}` adds them"
    ]


# The number


def test_a_run_records_its_format_and_a_file_of_its_settings_trains_another(old, tmp_path):
    config = read_run_config(old / "run" / "config.json")
    train(config, tmp_path / "first", CPU)
    settings = json.loads((tmp_path / "first" / "config.json").read_text())
    assert settings["format"] == RUN_FORMAT == 2
    assert read_run_settings(tmp_path / "first" / "config.json")[1] == 2
    assert RunFolder.open(tmp_path / "first").config == config


@pytest.mark.parametrize("number", [3, 99, 0, -1, "2", 2.0, True, None, [2]])
def test_another_format_is_refused_in_one_line_by_every_command_that_reads_runs(old, number):
    set_format(old / "run", number)
    before = everything(old)
    path = old / "run" / "config.json"
    message = (
        f"error: {path}: format: expected 1 or 2, found {json.dumps(number)}; "
        "use the version of iisan-fast that made the run\n"
    )
    assert refused("evaluate", old / "run") == message
    assert refused("train", "--resume", old / "run") == message
    assert refused("train", "--config", path, "--out", old / "new") == message
    assert everything(old) == before
    with pytest.raises(InputError, match="format: expected 1 or 2"):
        load(old / "run", CPU)


@pytest.mark.parametrize("number", ["absent", 1, 2])
def test_runs_of_known_formats_open(old, number):
    set_format(old / "run", number)
    assert RunFolder.open(old / "run").config.train.max_epochs == 3


def test_a_cache_of_another_format_is_refused_in_one_line(old):
    path = old / "cache" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 4}))
    message = f"error: {path}: format: expected 1 or 2, found 4; extract into a new cache\n"
    assert refused("train", old / "dataset", "--cache", old / "cache", "--out", old / "new") == message
    assert refused("train", "--resume", old / "run") == message
    assert not (old / "new").exists()
