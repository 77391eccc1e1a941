"""Progress bars on standard error, shown only if it is a terminal, and by one process of a job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .launcher import is_silent_rank
from .printable import printable

LOGGER = logging.getLogger(__name__)
Advance = Callable[..., None]


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a progress bar during the block, and yield the function that moves it.

    description: the text on the left. total: how many units there are. unit: their name, for "12 items/s".
    The function is called as advance(count, note=""): `count` more units are done; `note` is shown on the right.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    is_shown = console.is_terminal and LOGGER.isEnabledFor(logging.INFO)  # messages are off: so are bars
    is_shown = is_shown and not is_silent_rank()
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task(printable(description), total=total, speed="", note="")

        def advance(count: int, note: str = "") -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=count, note=printable(note), speed=f"{speed:,.0f} {unit}/s" if speed else "")

        yield advance
