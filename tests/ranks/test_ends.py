"""Whatever ends one rank ends all of them within seconds: one line, from one rank, and one exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.failing_ranks import run, run_command
from helpers.rank_programs import launcher_variables, run_programs

HERE = socket.gethostname()
LOST = (
    "is lost: it was killed, has crashed, or its machine cannot be reached; start the job again; "
    "a training goes on by --resume, or at once by torchrun --max-restarts"
)
KILLED = -signal.SIGKILL
QUICK = [
    (["exchanges", "fails", "exchanges"], [2, 2, 2], f"error: rank 1 on {HERE}: bad file"),
    (["agrees", "agrees"], [2, 2], f"error: rank 1 on {HERE}: bad item"),
    (["reads", "cannot read"], [2, 2], f"error: rank 1 on {HERE}: DATASET: no such folder"),
    (["computes", "is killed", "exchanges"], [2, KILLED, 2], f"error: rank 1 on {HERE} {LOST}"),
    (["is killed", "exchanges", "computes"], [KILLED, 2, 2], f"error: rank 0 on {HERE} {LOST}"),
]
LONG = [
    (["computes", "fails"], [2, 2], f"error: rank 1 on {HERE}: bad file"),
    (["fails", "computes", "exchanges"], [2, 2, 2], "error: bad file"),
    (["fails", "fails"], [2, 2], "error: bad file"),
    (["exchanges", "is stopped"], [143, 143], f"stopped: rank 1 on {HERE}"),
    (["is stopped", "computes"], [143, 143], "stopped"),
    (["succeeds", "fails"], [2, 2], f"error: rank 1 on {HERE}: bad file"),
    (["succeeds", "is killed"], [2, KILLED], f"error: rank 1 on {HERE} {LOST}"),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]


@pytest.mark.parametrize(("ways", "codes", "line"), CASES, ids=[" + ".join(ways) for ways, *_ in (*QUICK, *LONG)])
def test_one_line_and_one_exit_code(tmp_path, ways, codes, line):
    results = run_programs(tmp_path, run, ways, seconds=30)
    assert [result.returncode for result in results] == codes
    expected = ["" for _ in ways]
    expected[0] = "" if "cannot read" in ways else "progress of rank 0\n"
    expected[1 if ways[0] == "is killed" else 0] += f"{line}\n"
    assert [result.stderr for result in results] == expected


@pytest.mark.long
def test_an_error_of_the_program_on_one_rank_is_a_line_and_a_file(tmp_path):
    variables = launcher_variables(3, XDG_STATE_HOME=str(tmp_path / "state"))
    results = run_programs(tmp_path, run, ["computes", "exchanges", "breaks"], variables)
    (file,) = tmp_path.rglob("traceback-*.txt")
    line = f"internal error: rank 2 on {HERE}: TypeError: not a float; the traceback is in {file}; please report it"
    assert [result.returncode for result in results] == [1, 1, 1]
    assert [result.stderr for result in results] == [f"progress of rank 0\n{line}\n", "", ""]
    assert "TypeError: not a float" in file.read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("ways", "line"), [(["saves"] * 3, "stopped: run: step 3 is saved"), (["computes"] * 2, "stopped")]
)
def test_a_signal_to_torchrun_stops_all_ranks_with_one_line(tmp_path, name, ways, line):
    with torchrun(tmp_path, ways) as launcher:
        launcher.send_signal(getattr(signal, name))
        assert launcher.wait(30) != 0
    assert own_lines(tmp_path) == ["progress of rank 0", line]


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_and_the_program_print_one_line_for_a_killed_rank(tmp_path, killed):
    ways = ["exchanges", "computes", "computes"]
    ways[killed] = "is killed"
    with torchrun(tmp_path, ways) as launcher:
        assert launcher.wait(30) == 1
    assert own_lines(tmp_path) == ["progress of rank 0", f"error: rank {killed} on {HERE} {LOST}"]


@contextmanager
def torchrun(folder: Path, ways: list[str]) -> Iterator[subprocess.Popen]:
    """Start ranks by torchrun, and wait until rank 0 is at work. What they print goes into files in the folder."""
    arguments = ("--standalone", "--nproc-per-node", str(len(ways)), "-m", "helpers.failing_ranks", *ways)
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        launcher = subprocess.Popen(command, stdout=out, stderr=err, env=variables)
    try:
        deadline = time.monotonic() + 60
        while "progress" not in (folder / "err").read_text():
            assert launcher.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()
            time.sleep(0.05)
        time.sleep(0.5)  # the ranks begin to wait
        yield launcher
    finally:
        launcher.terminate()  # which ends its ranks
        launcher.wait(60)


def own_lines(folder: Path) -> list[str]:
    """Return the lines that the program, not torchrun, has printed on standard error."""
    words = ("progress", "error:", "stopped", "internal")
    return [line for line in (folder / "err").read_text().splitlines() if line.startswith(words)]


def test_rank_0_alone_prints(tmp_path):
    results = run_programs(tmp_path, run, ["succeeds"] * 3)
    assert [result.returncode for result in results] == [0, 0, 0]
    assert [result.stdout for result in results] == ["figures of rank 0\n", "", ""]
    assert [result.stderr for result in results] == ["progress of rank 0\n", "", ""]


def test_a_command_of_one_process_is_refused(tmp_path):
    results = run_programs(tmp_path, run_command, [["stats", "DATASET"]] * 2)
    assert [result.returncode for result in results] == [2, 2]
    line = "error: iisan-fast stats: runs in one process, found 2 ranks; run it without the launcher\n"
    assert [result.stderr for result in results] == [line, ""]
