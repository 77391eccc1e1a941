"""Compare items by their frozen states: whitened principal components of the final states, of length 1.

The coordinates of an item depend on its states alone, to the last bit: not on the items it is read with, the batch, the
device or the number of threads. So equal items get equal coordinates, and a new item gets those that it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..states import ItemSource
from .item_encoders import final_states

PROFILE_WEIGHTS = (1.0, 0.7, 0.49)  # of a history's last items, the newest first
USERS_AT_ONCE = 1024  # whose sums are taken in float64 at once: 1 MiB at 128 dimensions, which stays in a core's cache
LEAST_VARIANCE = 1e-10  # of a component, beside that of the first; below it is rounding
EXACT_BITS = 53  # of a sum in float64


class _Moments(NamedTuple):
    """The mean and the covariance of the joined states of a catalogue, float64."""

    mean: Tensor  # [W]
    covariance: Tensor  # [W, W]
    widths: list[int]  # of the views; their sum is W


@dataclass(frozen=True)
class Similarity:
    """Coordinates of all items, and the map from states to coordinates. All tensors are float32, on the host.

    W is the sum of the views' widths: their final states are joined in the order of the views.
    """

    vectors: Tensor  # [items, dims], of length 1; zeros for an item at the mean; item number i in row i - 1
    mean: Tensor  # [W]
    scale: Tensor  # [W]: the total standard deviation of the column's view, by which it is divided
    basis: Tensor  # [W, dims]: principal directions, each divided by the standard deviation along it

    @classmethod
    def of(cls, source: ItemSource, dims: int) -> Similarity:
        """Fit the map on all items of a source, and return it with their coordinates.

        The covariance is taken in float64 on the source's device. The source is read twice, in parts. dims: components
        to keep, the strongest; there are fewer if the states have a lower rank. Raises InputError if a state is not
        finite.
        """
        mean, covariance, widths = _moments(source)
        variances = covariance.diagonal().split(widths)
        deviations = [float(part.sum().sqrt()) or 1.0 for part in variances]
        scale = torch.cat([torch.full((width,), value) for width, value in zip(widths, deviations)])
        basis = _whitening(covariance / torch.outer(scale, scale).to(covariance), dims)
        empty = cls(torch.empty(0, basis.shape[1]), mean.float().cpu(), scale, basis.float().cpu())
        vectors = [empty.project(states).cpu() for states in _parts(source)]
        return cls(torch.cat(vectors), empty.mean, empty.scale, empty.basis)

    def project(self, states: Sequence[Tensor]) -> Tensor:
        """Return the coordinates of N items, float32 [N, dims], of length 1, on the device of their states.

        states: the final states of each view, [N, D], in any floating dtype. Raises ValueError for other widths than
        those of the map.
        """
        joined = torch.cat([part.double() for part in states], dim=1)
        if joined.shape[1] != len(self.mean):
            raise ValueError(f"states: expected widths that sum to {len(self.mean)}, found {joined.shape[1]}")
        mean, scale, basis = (tensor.to(joined) for tensor in (self.mean, self.scale, self.basis))
        bits = _bits(len(mean))
        return _unit(_rounded((joined - mean) / scale, 1, bits) @ basis).float()

    def profiles(self, histories: np.ndarray) -> Tensor:
        """Return the sums of the last items' coordinates, float32 [R, dims], of length 1; zeros without a history.

        histories: item numbers, int64 [R, width], right-aligned, 0 for padding.
        """
        vectors = self.vectors.numpy()
        profiles = np.empty((len(histories), vectors.shape[1]), dtype=np.float32)
        for first in range(0, len(histories), USERS_AT_ONCE):
            part = histories[first : first + USERS_AT_ONCE]
            sums = np.zeros((len(part), vectors.shape[1]))
            for weight, column in zip(PROFILE_WEIGHTS, part.T[::-1]):
                weights = np.where(column > 0, weight, 0)  # padding takes any item, without weight
                sums += vectors[np.maximum(column - 1, 0)] * weights[:, None]
            squares = sum(np.ascontiguousarray((sums * sums).T), np.zeros(len(part)))  # in one order, as in `_unit`
            profiles[first : first + len(part)] = sums / np.sqrt(np.where(squares > 0, squares, 1))[:, None]
        return torch.from_numpy(profiles)


def _parts(source: ItemSource) -> Iterator[list[Tensor]]:
    """Yield the final states of all items in parts, on the device: [n, D] of each view."""
    numbers = torch.arange(1, source.rows, device=source.index_device)
    for part in numbers.split(source.items_at_once):
        with torch.inference_mode():
            states = final_states(source.read(part))
        yield states


def _moments(source: ItemSource) -> _Moments:
    """Return the mean and covariance of the joined final states of all items. Raises InputError; see `Similarity.of`.

    The sums are of differences from the first item. They are exact zeros if all items are equal.
    """
    shift = total = products = torch.empty(0)
    widths: list[int] = []
    seen = 0
    for states in _parts(source):
        joined = torch.cat([part.double() for part in states], dim=1)
        finite = joined.isfinite().all(dim=1)
        if not finite.all():
            number = seen + int(finite.int().argmin()) + 1
            raise InputError(f"similarity: item number {number} has a state that is not finite; extract states again")
        if not seen:
            widths = [part.shape[1] for part in states]
            shift = joined[0]
            total = torch.zeros_like(shift)
            products = torch.zeros_like(torch.outer(shift, shift))
        differences = joined - shift
        total += differences.sum(dim=0)
        products.addmm_(differences.T, differences)
        seen += len(joined)
    offset = total / seen
    return _Moments(shift + offset, products / seen - torch.outer(offset, offset), widths)


def _whitening(covariance: Tensor, dims: int) -> Tensor:
    """Return the directions of most variance, each divided by the standard deviation along it, float64 [W, dims].

    The entry of largest magnitude is positive in each direction. There are fewer than `dims` if no other has variance.
    Entries are rounded for an exact product; see `_bits`.
    """
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.flip(0)[:dims]
    directions = directions.flip(1)[:, :dims]
    rank = int((variances > max(0.0, LEAST_VARIANCE * float(variances[0]))).sum())
    directions = directions[:, :rank]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return _rounded(directions * largest.sign() / variances[:rank].sqrt(), 0, _bits(len(covariance)))


def _bits(width: int) -> int:
    """Return b such that a sum of `width` products of b-bit whole numbers is exact in float64, in whatever order.

    It is 21 for a width of 384 to 2,048, and at most float32's 24.
    """
    return min(24, (EXACT_BITS - math.ceil(math.log2(width))) // 2)


def _rounded(values: Tensor, dim: int, bits: int) -> Tensor:
    """Round float64 values to `bits` bits below the largest magnitude along a dimension."""
    largest = values.abs().amax(dim=dim, keepdim=True)
    mantissa, _ = torch.frexp(largest)
    power = torch.where(largest > 0, largest / mantissa, torch.ones_like(largest))  # the next power of two
    unit = power * 0.5**bits
    return (values / unit).round() * unit


def _unit(rows: Tensor) -> Tensor:
    """Scale rows, float64 [N, dims], to length 1; zeros stay. Squares are added column by column, in one order."""
    squares = rows.new_zeros(len(rows))
    for column in (rows * rows).T.contiguous():
        squares += column
    lengths = squares.sqrt()
    return rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))[:, None]
