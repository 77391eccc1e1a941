"""A program whose command ends in a way of its own on each rank: `python -m helpers.failing_ranks WAY WAY …`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from iisan_fast import cli
from iisan_fast.errors import InputError, Stopped
from iisan_fast.ranks import job_watch, joined_ranks, meeting

LONG = 100.0  # seconds, of which a test waits for none


def work(way: str) -> None:
    """End this rank's command in a way.

    "cannot read" and "reads" end before they have joined the job; the others begin with an exchange.
    """
    if way == "cannot read":
        raise InputError("DATASET: no such folder")
    if way == "reads":
        time.sleep(LONG)
    ranks = joined_ranks()
    ranks.from_all(way)
    print(f"figures of rank {ranks.rank}")
    print(f"progress of rank {ranks.rank}", file=sys.stderr)
    WAYS[way](ranks)


def _fail_on_all(ranks) -> None:
    def check() -> None:
        if ranks.rank == 1:
            raise InputError("bad item")

    ranks.all_do(check)


def _fail() -> None:
    raise InputError("bad file")


def _fail_inside() -> None:
    raise TypeError("not a float")


def _stop() -> None:
    try:
        time.sleep(LONG)
    except SystemExit as error:
        raise Stopped("run: step 3 is saved", error.code - 128) from None


WAYS = {
    "succeeds": lambda ranks: None,
    "takes a while": lambda ranks: time.sleep(2),
    "exchanges": lambda ranks: ranks.from_all(0),
    "computes": lambda ranks: time.sleep(LONG),
    "fails": lambda ranks: _fail(),
    "breaks": lambda ranks: _fail_inside(),
    "is killed": lambda ranks: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": lambda ranks: os.kill(os.getpid(), signal.SIGTERM),
    "saves": lambda ranks: _stop(),
    "agrees": _fail_on_all,
}


def run(way: str) -> None:
    """Run the program with a command that ends in a way. Raises SystemExit, or ends the process."""
    torch.set_num_threads(1)
    job_watch.GRACE_SECONDS = 0.3
    job_watch.STOPPING_SECONDS = 1.0
    cli.train.callback = lambda **_: work(way)
    cli.main(["train"])


def run_command(arguments: list[str]) -> None:
    """Run the program. Raises SystemExit, or ends the process."""
    cli.main(arguments)


def meet(seconds: float) -> None:
    """Run the program with a command that succeeds, if all ranks come within some seconds."""
    meeting.SECONDS = seconds
    meeting.ANSWER_SECONDS = seconds / 2
    run("takes a while")


if __name__ == "__main__":
    run(sys.argv[1 + int(os.environ["RANK"])])
