"""The program `iisan-fast`, which `python -m iisan_fast` is too. A signal ends it with one line from the very start."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

from .launcher import is_silent_rank
from .stop_signals import STOP_SIGNALS


def main() -> None:
    """Run the program, as `cli.main` does, which takes a second to import. Raises SystemExit."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            signal.signal(number, _end)
    from .cli import main as run

    run()


def _end(number: int, _frame: FrameType | None) -> None:
    """End the process by a signal that came before or after a command's work. An import could swallow an exception."""
    if not is_silent_rank():
        with suppress(OSError):  # standard error is closed
            os.write(2, b"stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
