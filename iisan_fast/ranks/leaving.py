"""Let a process that a rank has started run by itself: it is no rank of the job."""

from __future__ import annotations

import os

OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def leave_job() -> None:
    """Make this process, which has not joined its job, run alone, on as many threads as the rank that started it.

    Nothing changes in a process that no rank has started.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for name in OF_A_JOB:
        os.environ.pop(name, None)
    if ranks_here > 1:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
