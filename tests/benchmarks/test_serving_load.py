"""The load test of the service: its figures from answers, and a small load on a real service."""

from __future__ import annotations

import pytest

from iisan_fast.benchmarks import serving_load
from iisan_fast.benchmarks.serving_load import Answered
from iisan_fast.errors import InputError


def test_failed_requests_count_as_errors_and_have_no_times():
    answers = [Answered(0.001 * (i + 1), 200) for i in range(101)] + [Answered(9.0, 500), Answered(9.0, 0)]
    figures = serving_load.figures(answers, 2.0)
    assert figures["requests_per_second"] == 50.5 and figures["errors"] == 2
    assert figures["milliseconds"] == pytest.approx({"p50": 51.0, "p90": 91.0, "p99": 100.0, "largest": 101.0})
    assert serving_load.figures([Answered(1.0, 500)], 1.0)["milliseconds"]["p99"] is None


def test_a_folder_without_export_is_refused(tmp_path):
    with pytest.raises(InputError, match="no export.json"):
        serving_load.measure(tmp_path, 1, 1)
