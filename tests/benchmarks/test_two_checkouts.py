"""Two checkouts side by side: the same checkout twice gives equal losses; wrong arguments get one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.benchmarks import loss_in_bfloat16, reading, scientific, two_checkouts
from iisan_fast.benchmarks.harness import run_script
from iisan_fast.benchmarks.two_checkouts import STEPS, compare
from iisan_fast.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_checkout_beside_itself_has_equal_losses(tmp_path):
    histories = [[1 + (user + 3 * i) % 40 for i in range(5 + user % 9)] for user in range(80)]
    dataset = write_dataset_folder(tmp_path / "toy", make_sequences(histories, items=40))
    result = compare(dataset, ROOT, rounds=1, without_compiler=False)
    assert result["largest_loss_difference"] == 0 and result["steps"] == STEPS
    before, after = result["before"], result["after"]
    assert before["dataset"] == after["dataset"] == "toy" and before["commit"] == after["commit"]
    assert result["ratio"] == after["p50_ms"] / before["p50_ms"] > 0


def test_a_checkouts_process_that_ends_is_an_error():
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as worker, pytest.raises(InputError, match="exit code 3"):
        two_checkouts.answer(worker)


def test_an_input_error_of_a_script_is_one_line(capsys):
    def main() -> None:
        raise InputError("users.tsv:3: expected two columns, found 1")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: users.tsv:3: expected two columns, found 1\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (two_checkouts, ["{folder}", "nowhere"]),
        (reading, ["--before", "nowhere"]),
        (loss_in_bfloat16, ["nowhere"]),
        (scientific, ["titles", "nowhere"]),
    ],
)
def test_a_script_names_a_folder_that_is_not_there(script, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *(word.format(folder=tmp_path) for word in words)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and "no such folder: nowhere" in capsys.readouterr().err
