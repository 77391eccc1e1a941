"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest

from iisan_fast.benchmarks import cells, evaluate, extract, serving, train, uncached


def stay_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Call what benchmarks measure in processes of their own: starting a process takes ten seconds."""
    for module in (cells, evaluate, extract, serving, train, uncached):
        patch.setattr(module, "in_a_process", lambda function, *arguments: function(*arguments))


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Let a benchmark start no process; memory is then the tests' own."""
    stay_in_this_process(monkeypatch)


@pytest.fixture(params=["in this process", pytest.param("in processes of its own", marks=pytest.mark.long)])
def in_either_place(request, monkeypatch) -> None:
    """Run the test once without other processes, and in the long run as the benchmark is."""
    if request.param == "in this process":
        stay_in_this_process(monkeypatch)
