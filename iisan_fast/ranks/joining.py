"""Join the job that torchrun, or a launcher that sets the same variables, has started this process for."""

from __future__ import annotations

import atexit
import sys
from contextvars import ContextVar
from datetime import timedelta

from ..devices import local_gpu
from ..errors import InputError
from ..launcher import JobPlace, job_place
from .agreement import refuse_disagreement, refuse_other_code
from .machines import Machine, take_share_of_cores
from .meeting import job_store
from .ranks import ALONE, Ranks

CPU_BACKEND, GPU_BACKENDS = "gloo", "cpu:gloo,cuda:nccl"
EXCHANGE_TIMEOUT = timedelta(minutes=30)  # rank 0 may write for long; a rank that dies is noticed at once

_joined: list[Ranks] = []
_stays_alone: ContextVar[bool] = ContextVar("stays_alone", default=False)


def joined_ranks(work: str | None = None) -> Ranks:
    """Return the ranks of this job: `ALONE` unless a launcher has started several processes.

    The first call waits for all ranks, and gives this one its share of the machine's cores. work: what this rank is
    about to do, in a few words; ranks that did different things would wait for each other's exchanges for ever. Raises
    InputError if the launcher's variables are no job, if the ranks do not come together, if they run other code, or if
    the work is not the same.
    """
    if _stays_alone.get():
        return ALONE
    place = job_place()
    if place is None:
        return ALONE
    if not _joined:
        _joined.append(_join(place))
    (ranks,) = _joined
    if work is not None:
        refuse_disagreement(ranks, {"work": work})
    return ranks


def _join(place: JobPlace) -> Ranks:
    """Connect to the other ranks. Raises InputError as `joined_ranks` does."""
    import torch
    from torch import distributed

    store = job_store(place)
    has_gpu = torch.cuda.is_available()
    if has_gpu and not distributed.is_nccl_available():
        raise InputError(
            "torch: has CUDA but no NCCL, which ranks on GPUs need; hide the GPUs by CUDA_VISIBLE_DEVICES="
        )
    if has_gpu and (gpu := local_gpu(place)) is not None:
        torch.cuda.set_device(gpu)
    backend = GPU_BACKENDS if has_gpu else CPU_BACKEND
    distributed.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.count, timeout=EXCHANGE_TIMEOUT
    )
    atexit.register(_leave)
    unplaced = Ranks(place.rank, place.count, local_rank=place.local_rank)
    machines = unplaced.from_all(Machine.here())
    take_share_of_cores(place, machines)
    here = [machine.name for machine in machines].count(machines[place.rank].name)
    ranks = Ranks(place.rank, place.count, here, place.local_rank)
    refuse_other_code(ranks)
    return ranks


def _leave() -> None:
    """Leave the job at the program's end. After an error nothing waits for ranks that may have gone."""
    from torch import distributed

    if not hasattr(sys, "last_type"):  # set by an exception that nothing has caught
        distributed.destroy_process_group()
