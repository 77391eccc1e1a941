"""Run a command as one rank of a job: rank 0 prints, and whatever ends one rank ends all of them with one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from types import FrameType

import click

from ..errors import InputError
from ..launcher import JobPlace, job_place
from ..printable import one_line
from ..ranks import RankEnding, end_of_lost_contact, watch_job
from .failures import ending_of
from .stopping import handled_signals, leaving_on_signals
from .streams import only_errors_kept

SHARED = frozenset(("train", "evaluate", "recommend", "extract", "bench"))  # commands whose work ranks share

SHOW_CURSOR = "\r\x1b[K\x1b[?25h"  # a progress bar that another thread draws hides it


def run_as_rank(place: JobPlace, command: Callable[[], int]) -> int:
    """Run a command as one rank of a job, and return its exit code. After an error the process ends here.

    The exit code is the same on all ranks, but for a rank that was killed.
    """
    watch = speaker = None
    with handled_signals(_go_on), only_errors_kept(place.rank == 0) as errors:

        def say(line: str) -> None:
            with contextlib.suppress(OSError):  # standard error is closed
                os.write(errors, f"{SHOW_CURSOR if os.isatty(errors) else ''}{one_line(line)}\n".encode())

        try:
            with leaving_on_signals():
                watch = watch_job(place, say)
                ending = RankEnding(command())
                sys.stdout.flush()
        except BaseException as error:
            ending = end_of_lost_contact(error) or ending_of(error)
            speaker = getattr(error, "speaker", None)
        if watch is not None:
            code = watch.leave(ending)
        else:
            code = ending.code
            if ending.line and (place.speaks_for_machine if speaker is None else speaker == place.rank):
                say(ending.line)
    if code:
        sys.stderr.flush()
        os._exit(code)  # nothing waits for ranks that have gone
    return code


def refuse_several_ranks(context: click.Context) -> None:
    """Raise InputError if a command that runs in one process was started on several ranks."""
    place = job_place()
    name = context.invoked_subcommand
    if place is not None and name not in SHARED:
        raise InputError(
            f"{context.command_path} {name}: runs in one process, found {place.count} ranks; "
            "run it without the launcher"
        )


def _go_on(_number: int, _frame: FrameType | None) -> None:
    """Do nothing on a signal that comes while the job ends: it ends within seconds."""
