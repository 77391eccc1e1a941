"""--quiet and --verbose: what each prints; standard output holds the result alone."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from helpers.command_line import Result, iisan_fast, refused
from iisan_fast.progress import progress_bar

FAST = ("--epochs", 1, "--batch-users", 16, "--embedding-dim", 16, "--bottleneck", 8, "--device", "auto")


@pytest.fixture
def train(toy_run, tmp_path, monkeypatch):
    """Return a function that trains a small run: train("--quiet"), or train(before=("--quiet",)) of the program."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test ends
    folders = iter(range(10))

    def run(*arguments: str, before: tuple[str, ...] = ()) -> Result:
        dataset, cache = toy_run
        out = tmp_path / str(next(folders))
        with warnings.catch_warnings():
            return iisan_fast(*before, "train", dataset, "--cache", cache, "--out", out, *FAST, *arguments)

    yield run
    iisan_fast("--version")  # levels of logging as they are by default


def test_by_default_progress_and_messages_are_shown(train, caplog):
    result = train("--json")
    assert json.loads(result.stdout)["epochs"] == 1
    assert result.stderr.startswith("epoch   1  loss ") and result.stderr.count("\n") == 1
    levels = {record.levelno for record in caplog.records}
    assert logging.INFO in levels and logging.DEBUG not in levels


@pytest.mark.parametrize("place", ["command", "program"])
def test_quiet_prints_the_result_alone(train, caplog, place):
    result = train("--json", "--quiet") if place == "command" else train("--json", before=("-q",))
    assert json.loads(result.stdout)["epochs"] == 1
    assert result.stderr == "" and caplog.messages == []


def test_quiet_still_prints_errors(toy_run):
    message = refused("train", toy_run[0], "--quiet", "--cache", toy_run[0])
    assert "not a cache of hidden states" in message


@pytest.mark.parametrize("place", ["command", "program"])
def test_verbose_says_what_is_chosen_and_why(train, caplog, place):
    result = train("--json", "--verbose") if place == "command" else train("--json", before=("-v",))
    assert json.loads(result.stdout)["epochs"] == 1 and "epoch   1" in result.stderr
    starts = ("device: ", "precision: torch.", "feature table: ", "training by ")
    assert [start for start in starts if not any(message.startswith(start) for message in caplog.messages)] == []
    (reason,) = [message for message in caplog.messages if message.startswith("device: ")]
    assert "(auto: " in reason


def test_verbose_shows_what_other_libraries_log(train):
    train("--verbose")
    assert logging.getLogger("some.other.library").isEnabledFor(logging.INFO)
    train()
    assert not logging.getLogger("some.other.library").isEnabledFor(logging.INFO)


def test_quiet_and_verbose_exclude_each_other():
    for arguments in (("stats", "DATASET", "-q", "-v"), ("--verbose", "stats", "DATASET", "--quiet")):
        assert "--quiet, --verbose: give one of them" in refused(*arguments)


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_a_bar_is_shown_in_a_terminal_unless_messages_are_off(monkeypatch, capsys, level):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    logger = logging.getLogger("iisan_fast")
    before = logger.level
    logger.setLevel(level)
    try:
        with progress_bar("reading", 10, "rows") as advance:
            advance(10)
    finally:
        logger.setLevel(before)
    assert ("reading" in capsys.readouterr().err) == (level == logging.INFO)


@pytest.mark.slow
def test_a_quiet_program_writes_nothing_on_standard_error(toy_run, tmp_path):
    dataset, cache = toy_run
    program = Path(sys.executable).with_name("iisan-fast")
    command = [program, "--quiet", "train", dataset, "--cache", cache, "--out", tmp_path / "run", *FAST, "--json"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and json.loads(result.stdout)["epochs"] == 1


@pytest.mark.parametrize("arguments", [("--quiet",), ()])
def test_a_quiet_command_does_not_silence_the_tests_after_it(arguments, toy_run):
    """The second case follows the first in one process."""
    assert logging.getLogger("iisan_fast").level == logging.NOTSET
    assert iisan_fast(*arguments, "stats", toy_run[0]).returncode == 0
