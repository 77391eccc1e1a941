"""Compute what a launch costs a GPU at the least, from the machine code of its kernel and the sizes of its arguments.

Two bounds: the warps' instructions at as many as the multiprocessors can issue, and the arguments' bytes at the rate at
which memory is copied. A kernel takes longer than either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..kernels import HEADER, Launch, StepShape
from .floors import H200_BYTES_PER_S, H200_CLOCK_HZ, H200_SMS
from .loop_trips import TripCounts, count_trips, memory_uses, products
from .machine_code import KernelReading, Lines, MachineLoop

LANES = 32  # of a warp
SLOTS_PER_S = 4 * H200_SMS * H200_CLOCK_HZ  # a multiprocessor issues at most 4 instructions of warps a clock


@dataclass(frozen=True)
class KnownBatch:
    """A packed batch with known counts, which a step's kernels read."""

    shape: StepShape
    words: np.ndarray  # int32
    table_rows: int  # of the catalogue's states

    @property
    def counts(self) -> dict[str, int]:
        """Return the header's fields."""
        return dict(zip(HEADER, self.words[: len(HEADER)].tolist()))

    def true_lengths(self) -> dict[int, int]:
        """Return how much of a dimension counts, by its length: of bounds the batch's true counts."""
        counts = self.counts
        shape = self.shape
        rows = counts["tiles"] * shape.tile_rows
        return {
            self.table_rows: counts["distinct"],
            shape.distinct: counts["distinct"],
            shape.distinct + 1: counts["distinct"] + 1,
            shape.rows: rows,
            shape.occurrences: counts["occurrences"],
            shape.tiles: counts["tiles"],
        }


class KernelCost(NamedTuple):
    """The least time and bytes of a launch on an H200."""

    slots: float  # instructions of warps that are issued
    bytes: int
    loop_instructions: int  # of a warp, in the loops that multiply matrices
    per_element: float | None  # instructions of a thread there by element of the tiles made
    asynchronous: int  # copies to shared memory there
    unknown_loops: int  # whose trips are not known, and count as one

    @property
    def issue_ms(self) -> float:
        """Return the milliseconds in which the instructions can be issued."""
        return 1000 * self.slots / SLOTS_PER_S

    @property
    def bytes_ms(self) -> float:
        """Return the milliseconds in which the bytes can be copied."""
        return 1000 * self.bytes / H200_BYTES_PER_S

    @property
    def bound_ms(self) -> float:
        """Return the larger of the two."""
        return max(self.issue_ms, self.bytes_ms)


def kernel_cost(launch: Launch, reading: KernelReading, batch: KnownBatch, packed: Mapping[int, Tensor]) -> KernelCost:
    """Return what a launch costs for a batch.

    Args: packed: by the address of its storage, a tensor whose memory holds the packed batch from its first element.
    """
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments))

    def memory(name: str, offset: int) -> int | None:
        tensor = arguments[name]
        place = tensor.storage_offset() + offset
        holds_batch = tensor.untyped_storage()._cdata in packed
        return int(batch.words[place]) if holds_batch and place < len(batch.words) else None

    integers = {name: value for name, value in arguments.items() if isinstance(value, int)}
    counts = count_trips(reading.ir, launch.grid, integers, memory)
    trips = loop_trips(reading, counts)
    inside = sum(loop.instructions for loop in reading.loops)
    a_warp = (reading.instructions - inside) * counts.programs
    a_warp += sum(loop.instructions * count for loop, count in trips.items())
    matrix = {loop: count for loop, count in trips.items() if loop.matrix}
    new_elements = products(reading.ir)
    elements = sum(new_elements.get(loop.lines, 0) * count for loop, count in matrix.items())
    executed = sum(loop.instructions * count for loop, count in matrix.items())
    return KernelCost(
        slots=reading.warps * a_warp,
        bytes=moved_bytes(reading, arguments, batch.true_lengths()),
        loop_instructions=sum(loop.instructions for loop in matrix),
        per_element=executed * reading.warps * LANES / elements if elements else None,
        asynchronous=sum(loop.asynchronous for loop in matrix),
        unknown_loops=len(counts.unknown),
    )


def loop_trips(reading: KernelReading, counts: TripCounts) -> dict[MachineLoop, float]:
    """Return the trips of each loop of the machine code, of all programs together.

    Loops of one statement stand for one: the longest takes the trips, each as many as it is unrolled. A loop that the
    compiler made for itself runs as often as the one that holds it.
    """
    by_lines: defaultdict[tuple, list[MachineLoop]] = defaultdict(list)
    loops = [loop._replace(lines=lines) for loop, lines in zip(reading.loops, _whole_lines(reading.loops, counts))]
    for loop in loops:
        by_lines[loop.lines].append(loop)
    trips: dict[MachineLoop, float] = {}
    for loop in reversed(loops):  # outer ones first
        if loop.lines in counts.trips:
            alike = by_lines[loop.lines]
            longest = max(alike, key=lambda one: one.instructions)
            unrolled = max(1, round(longest.instructions / min(one.instructions for one in alike)))
            trips[loop] = counts.trips[loop.lines] / unrolled if loop == longest else 0.0
        else:
            around = [one for one in trips if one.first <= loop.first and loop.last <= one.last]
            trips[loop] = trips[around[-1]] if around else counts.programs
    return trips


def _whole_lines(loops: Sequence[MachineLoop], counts: TripCounts) -> list[Lines]:
    """Return each loop's lines, with those of the calls that lead to it.

    The machine code of some versions leaves the calls out. Loops of one statement, called from several places, are then
    taken in the order of the calls.
    """
    whole = {loop: loop.lines for loop in loops}
    for statement in {loop.lines for loop in loops} - counts.trips.keys():
        called = sorted((lines for lines in counts.trips if lines[:1] == statement), key=lambda lines: lines[::-1])
        alike = sorted((loop for loop in loops if loop.lines == statement), key=lambda loop: loop.first)
        whole |= dict(zip(alike, called if len(called) > 1 else called * len(alike)))
    return [whole[loop] for loop in loops]


def moved_bytes(reading: KernelReading, arguments: Mapping[str, object], lengths: Mapping[int, int]) -> int:
    """Return the bytes of a launch's tensors, once if read and once more if written, in their true lengths."""
    total = 0
    for name, uses in memory_uses(reading.ir).items():
        tensor = arguments[name]
        assert isinstance(tensor, Tensor), name
        size = tensor.element_size()
        for length in tensor.shape:
            size *= lengths.get(length, length)
        total += uses * size
    return total
