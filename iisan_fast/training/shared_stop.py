"""Let all ranks of a run stop, and save, after the same step: they exchange what each of them wishes.

A signal reaches the ranks one after the other, or only one of them, and their clocks differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..intervals import Interval, IntervalClock
from ..ranks import Ranks
from ..stop_signals import STOP_SIGNALS, Interrupted, StopRequest


class SharedStop:
    """The signal on which all ranks have agreed, if there is one, and the time of the next checkpoint within an epoch.

    One process agrees with itself at once.
    """

    def __init__(self, request: StopRequest, interval: Interval | None, ranks: Ranks, exchange_every: int) -> None:
        """Begin without a signal.

        request: of this process. interval: between checkpoints within an epoch. exchange_every: steps between two
        exchanges of the ranks, each of which waits for the device.
        """
        self._request = request
        self._agreed: int | None = None
        self._clock = IntervalClock(interval)
        self._steps_alike = interval is not None and interval.steps is not None  # all ranks count the same steps
        self._ranks = ranks
        self._exchange_every = exchange_every

    @property
    def signal_number(self) -> int | None:
        """Return the number of the signal; None if there is none, or if the ranks have not agreed on it yet."""
        return self._agreed if self._ranks.several else self._request.signal_number

    def restart_clock(self) -> None:
        """Count the interval from now on."""
        self._clock.restart()

    def after_step(self, steps: int) -> bool:
        """Count a step, and return True if a checkpoint is due or a signal asks to stop.

        steps: of the epoch, that are taken. Every rank calls it after each step.
        """
        due = self._clock.step()
        if not self._ranks.several or steps % self._exchange_every == 0:
            due = self._agree(due)
        elif not self._steps_alike:
            due = False
        return due or self.signal_number is not None

    def agree(self) -> bool:
        """Return True if a signal asks to stop. Every rank calls it, in the same place."""
        self._agree(False)
        return self.signal_number is not None

    def interrupt(self) -> None:
        """Raise Interrupted on all ranks if a signal asks to stop. They call it between the parts of an evaluation.

        One process does nothing here: in its block of `interruptible` a signal acts at once.
        """
        if self._ranks.several and self.agree():
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise Interrupted inside the block, where nothing is written: at once, on several ranks later.

        Several ranks are interrupted together, by `interrupt`.
        """
        if self._ranks.several:
            yield
            return
        with self._request.raised_at_once():
            yield

    def _agree(self, due: bool) -> bool:
        """Take the signal of any rank as that of all, and return whether a checkpoint is due on rank 0."""
        if not self._ranks.several:
            return due
        number = self._request.signal_number
        wishes = torch.tensor([due and self._ranks.is_first, *(number == signal for signal in STOP_SIGNALS)])
        due, *asked = self._ranks.add_up(wishes.int()).tolist()
        self._agreed = next((int(signal) for signal, count in zip(STOP_SIGNALS, asked) if count), None)
        return due > 0
