"""Standardise hidden states: each number of a layer gets mean 0 and deviation 1 over the catalogue.

The statistics are computed on the host in float64, one row after the other, so that they do not depend on the device,
the number of threads, or the size of the parts in which the states are read.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ranks import ALONE, Ranks

# Below this share of a number's mean, its deviation is set to 0: it would amplify the rounding of an encoder, which
# differs from batch to batch, a thousand times and more.
LEAST_DEVIATION = 2.0**-10
ROWS_AT_ONCE = 512  # items whose states are converted to float64 at a time


class StateStatistics:
    """The mean and the deviation of each number of a view's states over the catalogue."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        """Take the mean and the deviation, float64 [K, D] on the host. Deviation 0: all items have the same number."""
        self.mean = mean
        self.deviation = deviation
        # A number without deviation is multiplied by 0.
        self._factors = torch.where(deviation > 0, 1 / deviation, 0.0)

    def standardise(self, states: Tensor) -> None:
        """Replace states [N, K, D] by (states - mean) / deviation, in place; 0 where the deviation is 0.

        The results are computed in float64 and rounded to the dtype of the states once. Any device gives equal results.
        """
        mean = self.mean.to(states.device)
        factors = self._factors.to(states.device)
        for part in states.split(ROWS_AT_ONCE):
            part.copy_((part.double() - mean) * factors)

    def tensors(self, view: str) -> dict[str, Tensor]:
        """Return the statistics by the names that a checkpoint has for those of this view."""
        return {f"states.mean.{view}": self.mean, f"states.deviation.{view}": self.deviation}


def state_statistics(
    parts: Iterable[Tensor], dtype: torch.dtype, where: str, first: Tensor | None = None, ranks: Ranks = ALONE
) -> StateStatistics:
    """Return the statistics of a view's states, parts [N, K, D] on the host with at least one item in all.

    The deviation is that of the whole catalogue: the root of the mean square difference from the mean. It is 0 for a
    number that varies by less than `LEAST_DEVIATION` of its mean, so that it stays out of the model. dtype: of the
    table, to which the states are rounded first. where: the view, for the message. first: the states [K, D] of the
    first item, if `parts` may lack it. ranks: that have the parts together. They get equal statistics, which differ
    from those of one process by rounding. Raises InputError, on all of them, if a number is not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # such numbers are refused below
        sums = _Sums(None if first is None else first.to(dtype).double().numpy())
        for states in (states for part in parts for states in part.split(ROWS_AT_ONCE)):
            sums.add(states.to(dtype).double().numpy())
        sums.add_up(ranks)
        mean = sums.total / sums.count
        deviation = np.sqrt(np.maximum(sums.squares / sums.count - mean * mean, 0))
    if not np.isfinite(deviation).all():
        layer, number = np.argwhere(~np.isfinite(deviation))[0].tolist()
        raise InputError(
            f"{where}: standardise: expected finite states, found one that is not (kept layer {layer + 1}, number "
            f"{number + 1}); extract them again with encoder_dtype float32, or leave standardise out"
        )
    mean += sums.first
    deviation[deviation < LEAST_DEVIATION * np.abs(mean)] = 0
    return StateStatistics(torch.from_numpy(mean), torch.from_numpy(deviation))


class _Sums:
    """The sums of states and of their squares, float64 [K, D], after the first item's states are subtracted.

    So equal numbers give exactly 0, and a large mean loses no digits.
    """

    def __init__(self, first: np.ndarray | None) -> None:
        """Begin with nothing. first: states [K, D] to subtract; None for those of the first row that is added."""
        self.count = 0
        if first is not None:
            self._begin(first)

    def add(self, rows: np.ndarray) -> None:
        """Add states [N, K, D], one row after the other."""
        if self.count == 0 and not hasattr(self, "first"):
            self._begin(rows[0])
        self.count += len(rows)
        for row in rows - self.first:
            self.total += row
            self.squares += row * row

    def add_up(self, ranks: Ranks) -> None:
        """Replace the sums by those over all ranks."""
        if ranks.several:
            for array in (self.total, self.squares):
                ranks.add_up(torch.from_numpy(array))
            self.count = sum(ranks.from_all(self.count))

    def _begin(self, first: np.ndarray) -> None:
        """Take the states to subtract, and set the sums to 0."""
        self.first = first.copy()
        self.total = np.zeros_like(first)
        self.squares = np.zeros_like(first)
