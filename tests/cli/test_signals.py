"""Check commands that a terminal or a scheduler stops: one line, the exit code, and work that goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.command_line import iisan_fast
from helpers.run_folders import assert_same_run
from iisan_fast.training.trainer import Trainer

COMMAND = (sys.executable, "-m", "iisan_fast")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def start(*arguments: object, **options) -> subprocess.Popen:
    """Start the program in a group of processes of its own, as a shell does."""
    command = [*COMMAND, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes, **options)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def settings_of(toy_run) -> tuple[object, ...]:
    dataset, cache = toy_run
    sizes = ("--embedding-dim", 16, "--bottleneck", 8, "--batch-users", 2, "--patience", 400, "--epochs", 25)
    return "train", dataset, "--cache", cache, *sizes, "--device", "cpu", "--json", "--quiet"


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_the_program_is_imported_is_a_line_too(number):
    code = f"""
import signal, sys
from iisan_fast.__main__ import main
class Finder:
    def find_spec(name, *_):
        if name == "iisan_fast.cli":
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Finder)
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (CODES[number], "", "stopped\n")


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_a_line_and_its_exit_code(toy_run, tmp_path, number, monkeypatch):
    take = Trainer.take

    def signalled(self, prepared):
        if prepared.batch.step == 4:
            signal.raise_signal(number)
        return take(self, prepared)

    monkeypatch.setattr(Trainer, "take", signalled)
    run = tmp_path / "a run"
    result = iisan_fast(*settings_of(toy_run), "--out", run)
    line = f"stopped: {run}: step 5 of epoch 1 is saved; go on with iisan-fast train --resume '{run}'\n"
    assert (result.returncode, result.stdout, result.stderr) == (CODES[number], "", line)


@pytest.mark.long
@pytest.mark.parametrize("number", CODES)
def test_a_training_that_is_stopped_says_how_it_goes_on_and_does(toy_run, tmp_path, number):
    run = tmp_path / "a run"
    with start(*settings_of(toy_run), "--out", run) as process:
        wait_for(run / "last.safetensors", process)
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)  # as a shell and a terminal do
        out, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number] and out == ""
    assert err.count("\n") == 1 and err.startswith(f"stopped: {run}: ") and " is saved; go on with " in err
    command = shlex.split(err.partition("go on with ")[2])
    assert command == ["iisan-fast", "train", "--resume", str(run)]
    with start(*command[1:], "--json", "--device", "cpu") as process:
        out, err = process.communicate(timeout=120)
    with start(*settings_of(toy_run), "--out", tmp_path / "whole") as process:
        expected, _ = process.communicate(timeout=120)
    assert json.loads(out) == json.loads(expected) | {"run": str(run)}
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.long
def test_a_training_under_nohup_outlives_its_terminal(toy_run, tmp_path):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with start(*settings_of(toy_run), "--out", tmp_path / "run", preexec_fn=ignore) as process:
        wait_for(tmp_path / "run" / "last.safetensors", process)
        os.killpg(process.pid, signal.SIGHUP)
        process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "run" / "test.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_has_nothing_to_save_is_one_line(toy_run, tmp_path, number):
    with start(*settings_of(toy_run), "--out", tmp_path / "run") as process:
        time.sleep(2.5)  # it imports torch
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number] and err.count("\n") <= 1 and "Traceback" not in err, err
