"""Join the job that torchrun, or a launcher that sets the same variables, has started this process for."""

from __future__ import annotations

import atexit
import os
from contextvars import ContextVar

from ..errors import InputError
from .agreement import refuse_other_code
from .ranks import ALONE, Ranks

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BACKENDS = "cpu:gloo,cuda:nccl"

_joined: list[Ranks] = []
_stays_alone: ContextVar[bool] = ContextVar("stays_alone", default=False)


def joined_ranks() -> Ranks:
    """Return the ranks of this job: `ALONE` unless a launcher has started several processes.

    The first call waits for all ranks. Raises InputError if the launcher's variables are no job, or if the ranks do not
    come together.
    """
    if _stays_alone.get() or _number("WORLD_SIZE", 1) <= 1:
        return ALONE
    if not _joined:
        _joined.append(_join())
    return _joined[0]


def _join() -> Ranks:
    """Connect to the other ranks."""
    import torch
    from torch import distributed

    rank, count = _number("RANK"), _number("WORLD_SIZE")
    local_rank = _number("LOCAL_RANK", 0)
    on_this_machine = _number("LOCAL_WORLD_SIZE", 1)
    distributed.init_process_group(BACKENDS if torch.cuda.is_available() else "gloo", rank=rank, world_size=count)
    atexit.register(distributed.destroy_process_group)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_machine))
    ranks = Ranks(rank, count, on_this_machine, local_rank)
    refuse_other_code(ranks)
    return ranks


def _number(name: str, default: int | None = None) -> int:
    """Return a whole number from the environment. Raises InputError if it is missing or no number."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise InputError(f"{name}: expected a whole number from the launcher, found {text!r}; start it by torchrun")
    return int(text)
