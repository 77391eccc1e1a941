"""A plugin of pytest: the processor time of each test, and a file of results of a whole run.

    pytest --results=FILE        write counts, times, versions and the commit to FILE
    pytest --slowest=N           list the N tests that took the most processor time

Processor time counts every core and every child process that has ended, so it says what a test costs even on a machine
that does other work. With a space in place of "=", pytest would take an existing FILE for tests.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from iisan_fast.benchmarks.machine import commit
from iisan_fast.training import environment

STARTED = pytest.StashKey[float]()
LISTED = 30  # tests in a file of results


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add both options."""
    group = parser.getgroup("durations")
    group.addoption("--results", type=Path, help="write counts, times, versions and the commit to this JSON file")
    group.addoption("--slowest", type=int, default=0, help="list the tests that took the most processor time")


def pytest_configure(config: pytest.Config) -> None:
    """Collect in the process that pytest was started as; the workers of pytest-xdist report to it."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Start to count before a test's fixtures are set up."""
    item.stash[STARTED] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[pytest.TestReport]:
    """Give each phase's report the processor time since the phase before."""
    report = yield
    now = processor_seconds()
    report.processor_seconds = now - item.stash[STARTED]
    item.stash[STARTED] = now
    return report


def processor_seconds() -> float:
    """Return the time that this process and its ended children have used on all cores."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Durations:
    """Adds up what the reports say, and prints or writes it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.begun = time.time()
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once, by its call or by what kept it from being called."""
        self.seconds[report.nodeid] += report.processor_seconds
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.skipped:
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the slowest tests, and write the file of results."""
        if (count := self.config.getoption("slowest")) > 0:
            total = sum(self.seconds.values())
            terminalreporter.section(f"slowest {count} tests, of {total:.0f} s of processor time")
            for name, seconds in self.seconds.most_common(count):
                terminalreporter.line(f"{seconds:8.2f}s {name}")
        if path := self.config.getoption("results"):
            path.write_text(json.dumps(self.results(), indent=1) + "\n")

    def results(self) -> dict:
        """Return the run as the file holds it."""
        return {
            "command": " ".join(["pytest", *self.config.invocation_params.args]),
            "commit": commit(),
            "environment": environment(torch.device("cpu")) | {"triton": version("triton")},
            "wall_seconds": round(time.time() - self.begun, 1),
            "processor_seconds": round(sum(self.seconds.values()), 1),
            "tests": dict(sorted(self.counts.items())),
            "skipped_because": dict(self.reasons.most_common()),
            "seconds_by_folder": self.seconds_by_folder(),
            "slowest": {name: round(seconds, 2) for name, seconds in self.seconds.most_common(LISTED)},
        }

    def seconds_by_folder(self) -> dict[str, float]:
        """Return the processor time of each folder's tests, those of the most first."""
        folders: Counter[str] = Counter()
        for name, seconds in self.seconds.items():
            folders[str(Path(name.split("::")[0]).parent)] += seconds
        return {folder: round(seconds, 1) for folder, seconds in folders.most_common()}
