"""Put averaged weights into a model for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def averaged_weights(averages: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give each parameter the values of its average within the block; afterwards it has its old values again.

    The parameters stay where they are. An exception may leave the block, but none may come while it begins or ends.
    """
    old_values = [parameter.detach().clone() for parameter in averages]
    _copy(averages.values(), averages)
    try:
        yield
    finally:
        _copy(old_values, averages)


@torch.no_grad()
def _copy(values: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    """Copy values into parameters, in order."""
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
