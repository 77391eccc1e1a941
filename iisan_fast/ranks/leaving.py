"""Let a process that a rank has started run by itself: it is no rank of the job."""

from __future__ import annotations

import os

from ..launcher import ADDRESS, COUNT, LOCAL_RANK, PORT, RANK, job_place


def threads_of_rank() -> int | None:
    """Return the number of torch's threads of this rank, to pass to a process that it starts; None for no rank."""
    if job_place() is None:
        return None
    import torch

    return torch.get_num_threads()


def leave_job(threads: int | None) -> None:
    """Make this process, which has not joined the job of the rank that started it, run alone.

    threads: from `threads_of_rank`, called by the rank.
    """
    if threads is None:
        return
    for name in (RANK, COUNT, LOCAL_RANK, ADDRESS, PORT):
        os.environ.pop(name, None)
    import torch

    torch.set_num_threads(threads)
