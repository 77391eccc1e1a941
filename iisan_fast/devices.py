"""Choose the torch device from its name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device with this name: auto (CUDA if there is a GPU, else the CPU), cpu, cuda or cuda:N.

    Raises InputError for any other name, for a GPU that this machine does not have, and if the environment asks for a
    form of the ops that cannot run on the device.
    """
    from . import kernels  # imports torch, which takes seconds

    device = _named_device(name)
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
