"""The tests that need a GPU, run by pytest: counts as they come, so that a stopped run says what it got to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .settings import Save, Settings

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
OUTCOME = re.compile(r"^(?P<test>\S+\.py::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (?P<test>\S+\.py::.+?) - (?P<reason>.*)$")
COLLECTED = re.compile(r"^=* ?(?:(?P<selected>\d+)/)?(?P<all>\d+) tests? collected")
MOST_FAILURES = 15  # then pytest gives up
KERNELS = "err_as_little or errs_as_little or repeat or graph or equal_the_references or waits"


def measure(settings: Settings, save: Save) -> None:
    """Save how many tests passed, and why others did not. Raises SystemExit where one fails, or none is collected."""
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}, "headline": ""}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["COLUMNS"] = "250"  # in narrow lines pytest leaves reasons out
    words = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    words += [f"--maxfail={MOST_FAILURES}", *selection(settings)]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with interrupts_ignored():  # pytest, interrupted with this process, then says why tests failed
        for _ in counted(process.stdout, result):
            save(result)
    if code := process.wait():
        raise SystemExit(f"pytest: exit code {code}: {result['headline']}")


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore SIGINT in this process, so that an interrupt of its process group stops pytest alone."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def selection(settings: Settings) -> list[str]:
    """Return pytest's arguments: the tests of a stage. A dry run takes stand-ins, or only collects."""
    step = TESTS / "training"
    if settings.stage == "step-tests":
        name = "test_training_step_stand_in.py" if settings.dry_run else "test_training_step_gpu.py"
        return [str(step / name)]
    files = [*sorted((TESTS / "ops").glob("*_gpu.py")), TESTS / "benchmarks" / "test_gpu_timing.py"]
    return [*map(str, files), "-k", KERNELS, *(["--collect-only", "-q"] if settings.dry_run else [])]


def counted(lines: Iterable[str], result: dict[str, Any]) -> Iterable[None]:
    """Print pytest's lines and count them in the result; yield whenever it changed."""
    for line in lines:
        print(line, end="", flush=True)
        if match := OUTCOME.match(line):
            outcome = {"PASSED": "passed", "SKIPPED": "skipped", "XFAIL": "skipped"}.get(match["outcome"], "failed")
            result[outcome] += 1
            if outcome == "failed":
                result["failures"][match["test"]] = ""
        elif match := REASON.match(line):
            result["failures"][match["test"]] = match["reason"]
        elif match := COLLECTED.match(line):
            result["collected"] = int(match["selected"] or match["all"])
        else:
            continue
        counts = [name for name in ("passed", "failed", "skipped", "collected") if result.get(name)]
        result["headline"] = ", ".join(f"{result[name]} {name}" for name in counts)
        yield
