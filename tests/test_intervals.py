"""Check that intervals are read from numbers and texts, and that others are refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.errors import InputError
from iisan_fast.intervals import Interval


@pytest.mark.parametrize(
    ("value", "steps", "seconds"),
    [(500, 500, None), ("500", 500, None), ("90s", None, 90), ("10m", None, 600), ("2h", None, 7200)],
)
def test_an_interval_is_steps_or_a_time(value, steps, seconds):
    assert Interval.of(value, "every") == Interval(steps, seconds)


@pytest.mark.parametrize("value", ["", "0", 0, -5, "0s", "-1m", "10 m", "1.5h", "m", "5d", "٣", "1_0", "9" * 30, "5\n"])
def test_other_values_are_refused_by_name(value):
    with pytest.raises(InputError, match=r"^every: expected a number of steps from 1, .*; found "):
        Interval.of(value, "every")


@given(st.text(max_size=12))
def test_any_text_is_an_interval_or_refused(text):
    try:
        interval = Interval.of(text, "every")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert (interval.steps or interval.seconds) >= 1 and None in (interval.steps, interval.seconds)


def test_an_interval_is_over_after_its_steps_or_its_time():
    steps, time = Interval.of(500, "every"), Interval.of("10m", "every")
    assert not steps.is_over(499, 1e9) and steps.is_over(500, 0)
    assert not time.is_over(10**9, 599.9) and time.is_over(1, 600)
