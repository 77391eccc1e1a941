"""The harness of faults: it tells each kind of ending apart, and the program takes kills, flips and changes well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"
COUNTS = {"kills": 100, "flips": 500, "mutations": 2000}

# In a process of its own: forking is safe only where no thread has run, and tests run after others.
ENDINGS = """
import json, os, signal, sys, time
from iisan_fast.benchmarks.faults.children import Kill, run_child, run_children
from iisan_fast.errors import InputError, Stopped

def refuse(): raise InputError("no")
def stop(): raise Stopped("saved", signal.SIGTERM)
def fail(): raise KeyError("x")
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def grow(): return len(bytearray(200 << 20))

kinds = [run_child(work, limit=2).kind for work in (refuse, stop, fail, crash, lambda: time.sleep(9))]
killed = run_child(lambda: time.sleep(9), Kill(0.05)).kind
several = [ending.kind for ending in run_children([lambda: 1, crash, lambda: 2, refuse])]
grown = run_child(grow)
print(json.dumps([kinds, killed, several, grown.value, grown.grown_bytes]))
"""


def test_endings_are_told_apart():
    output = subprocess.run([sys.executable, "-c", ENDINGS], capture_output=True, text=True, check=True).stdout
    kinds, killed, several, value, grown = json.loads(output)
    assert kinds == ["refused", "stopped", "traceback", "crash", "hang"] and killed == "killed"
    assert several == ["done", "crash", "done", "refused"]
    assert value == 200 << 20 <= grown < 300 << 20


def faults(tmp_path: Path, *options: str) -> dict:
    """Return the result of the harness, run with options."""
    file = tmp_path / "faults.json"
    command = [sys.executable, "-m", "iisan_fast.benchmarks.faults", *options, f"--out={file}"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_few_faults_are_taken_well(tmp_path):
    result = faults(tmp_path, "--kills=1", "--flips=4", "--mutations=24", "--seed=7000")
    for name, count in {"kills": 1, "flips": 4, "mutations": 24}.items():
        assert result[name]["trials"] == sum(result[name]["outcomes"].values()) == count
        assert result[name]["faults"] == []
    assert len(result["mutations"]["by_kind"]) == 24


@pytest.mark.long
def test_many_faults_are_taken_well(tmp_path):
    result = faults(tmp_path, *(f"--{name}={count}" for name, count in COUNTS.items()), "--seed=20000")
    assert [result[name]["faults"] for name in COUNTS] == [[], [], []]


def test_the_committed_result_holds_no_fault():
    result = json.loads(RESULT.read_text())
    for name, count in COUNTS.items():
        assert result[name]["trials"] >= count and result[name]["faults"] == []
    assert result["flips"]["outcomes"].get("silent", 0) == 0
