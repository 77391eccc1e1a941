"""Parse how often something is done: after a number of steps, or after a time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from .errors import InputError

SECONDS = {"s": 1, "m": 60, "h": 3600}
FORM = re.compile(r"0*([1-9][0-9]{0,8})([smh]?)", re.ASCII)


@dataclass(frozen=True)
class Interval:
    """A number of steps or of seconds; the other one is None."""

    steps: int | None = None
    seconds: int | None = None

    @classmethod
    def of(cls, value: int | str, name: str) -> Interval:
        """Return the interval of a setting: 500 (steps), "90s", "10m" or "2h".

        name: of the setting. Raises InputError, naming it, for another value.
        """
        match = FORM.fullmatch(str(value))
        if match is None:
            raise InputError(
                f"{name}: expected a number of steps from 1, as 500, or a time, as 90s, 10m or 2h; found {value!r}"
            )
        count = int(match[1])
        return cls(seconds=count * SECONDS[match[2]]) if match[2] else cls(steps=count)

    def is_over(self, steps: int, seconds: float) -> bool:
        """Return True after so many steps and seconds."""
        if self.steps is not None:
            return steps >= self.steps
        return self.seconds is not None and seconds >= self.seconds


class IntervalClock:
    """Counts the steps and the time since something was done the last time."""

    def __init__(self, interval: Interval | None) -> None:
        """Start now. interval: None never ends."""
        self._interval = interval
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._steps = 0
        self._started = time.monotonic()

    def step(self) -> bool:
        """Count a step, and return True if the interval is over."""
        self._steps += 1
        return self._interval is not None and self._interval.is_over(self._steps, time.monotonic() - self._started)
