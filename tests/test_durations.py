"""The plugin that counts what tests cost, and the file of a run's results."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers.durations import Durations, processor_seconds


def report(name: str, when: str, outcome: str, seconds: float, reason: str = "") -> SimpleNamespace:
    """Return the fields of a test's report that the plugin reads."""
    return SimpleNamespace(
        nodeid=name,
        when=when,
        outcome=outcome,
        skipped=outcome == "skipped",
        longrepr=("file", 1, f"Skipped: {reason}"),
        processor_seconds=seconds,
    )


def test_the_time_of_children_counts():
    before = processor_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"], check=True)
    assert processor_seconds() - before >= 0.3


def test_each_test_counts_once_with_all_its_phases(pytestconfig, tmp_path):
    durations = Durations(SimpleNamespace(getoption={"slowest": 0, "results": tmp_path / "tests.json"}.get))
    durations.config.invocation_params = pytestconfig.invocation_params
    for when, seconds in (("setup", 1.0), ("call", 2.0), ("teardown", 0.25)):
        durations.pytest_runtest_logreport(report("tests/a/test_one.py::one", when, "passed", seconds))
    durations.pytest_runtest_logreport(report("two", "setup", "skipped", 0.0, "needs a CUDA GPU"))
    durations.pytest_runtest_logreport(report("two", "teardown", "passed", 0.0))
    durations.pytest_runtest_logreport(report("three", "setup", "passed", 0.0))
    durations.pytest_runtest_logreport(report("three", "call", "failed", 0.5))
    durations.pytest_terminal_summary(None)
    results = json.loads((tmp_path / "tests.json").read_text())
    assert results["tests"] == {"failed": 1, "passed": 1, "skipped": 1}
    assert results["skipped_because"] == {"needs a CUDA GPU": 1}
    assert results["slowest"] == {"tests/a/test_one.py::one": 3.25, "three": 0.5, "two": 0.0}
    assert results["seconds_by_folder"] == {"tests/a": 3.2, ".": 0.5}
    assert results["processor_seconds"] == pytest.approx(3.8, abs=0.06)
    assert {"commit", "environment", "command", "wall_seconds"} <= results.keys()
