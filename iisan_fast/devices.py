"""Choose the torch device from its name."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from .errors import InputError
from .launcher import JobPlace, job_place

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device with this name: auto (CUDA if there is a GPU, else the CPU), cpu, cuda or cuda:N.

    In a job of several ranks, auto and cuda are this rank's own GPU. Raises InputError for any other name, for a GPU
    that this machine does not have, for fewer GPUs than ranks, and if the environment asks for a form of the ops that
    cannot run on the device.
    """
    from . import kernels  # imports torch, which takes seconds

    device = _device_of_rank(_named_device(name))
    try:
        kernels.check_form(device)
    except kernels.FormError as error:
        raise InputError(str(error)) from None
    return device


def _named_device(name: str | torch.device) -> torch.device:
    """Return the device, without a check of the ops. Raises InputError if there is no such device."""
    import torch

    if name == "auto":
        has_gpu = torch.cuda.is_available()
        LOGGER.debug(
            "device: %s", "cuda (auto: there is a GPU)" if has_gpu else "cpu (auto: no GPU that torch can use)"
        )
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: this machine has {torch.cuda.device_count()} CUDA devices, found {name!r}")
    return device


def local_gpu(place: JobPlace) -> int | None:
    """Return the number of a rank's GPU among those that torch sees; None if this machine has too few.

    A launcher such as srun may show each rank one GPU alone, by CUDA_VISIBLE_DEVICES; it is that rank's.
    """
    import torch

    count = torch.cuda.device_count()
    is_bound = count == 1 and VISIBLE in os.environ and not place.by_torchrun
    if is_bound:
        return 0
    return place.local_rank if place.local_rank < count else None


def _device_of_rank(device: torch.device) -> torch.device:
    """Return this rank's GPU in place of "cuda" in a job of several ranks. Raises InputError if it has none."""
    import torch

    place = job_place()
    if place is None or device.type != "cuda":
        return device
    if device.index is not None:
        raise InputError(f"device: expected auto, cpu or cuda on {place.count} ranks, found {str(device)!r}")
    number = local_gpu(place)
    if number is None:
        count = torch.cuda.device_count()
        raise InputError(
            f"device: LOCAL_RANK is {place.local_rank}, and this machine has {count} CUDA devices; start at most "
            f"{count} ranks on it, or choose the device cpu"
        )
    return torch.device("cuda", number)
