"""Functions that tests call in worker processes, which import no test module."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

ATTEMPTS: list[int] = []  # of this process, to send a result


class NoRoom:
    """A result that cannot be sent at the first attempt, as if /dev/shm were full."""

    def __reduce__(self) -> tuple[Any, ...]:
        ATTEMPTS.append(1)
        if len(ATTEMPTS) == 1:
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )
        return torch.arange, (7,)


def without_room(_: int) -> NoRoom:
    return NoRoom()


def unsendable(_: int) -> Any:
    return lambda: None


def batch_of(number: int) -> dict[str, torch.Tensor]:
    return {"inputs": torch.full((3, 100_000), number, dtype=torch.float32)}


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def beyond_memory(_: int) -> torch.Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)


def faulty(_: int) -> None:
    raise RuntimeError("shapes differ")
