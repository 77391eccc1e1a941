"""SASRec on a CPU in C++ (`cpp/sequence_encoder.cpp`); in training the workers divide the users."""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import shares
from ..types import (
    BLOCK_WEIGHTS,
    OUTER_WEIGHTS,
    EncoderBlock,
    RecommenderWeights,
    SequenceDropout,
    SequenceGrid,
    SequenceWeights,
)
from .library import DTYPES, PANEL, library
from .schedule import share_out, wrong_sizes
from .step_calls import GradientParts, Output, StepCalls, addresses
from .step_memory import Memory
from .structs import EncoderBlockStruct, EncoderStruct, RowsStruct
from .sums import add_up

MOST_BLOCKS = 64
MOST_WORKERS = 4  # each worker writes gradients of all weights, and these are added up
MOST_UNTRAINED = 512  # rows of a part if no backward follows: a row takes about 10 KB, so the part fits the cache
FEED_IN = EncoderBlock._fields.index("feed_in")


def sequence_encoder(
    x: Tensor, weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout | None
) -> Tensor:
    """Return the hidden states [R, d] of rows x [R, d], differentiable once in x and the weights.

    The arguments are those of the public op, checked; `refusal` must return "" for the weights.
    """
    grid = grid._replace(slots=grid.slots.contiguous())
    if dropout is not None:
        dropout = dropout._replace(prefix=int(dropout.prefix), users=dropout.users.contiguous())
    settings = SequenceSettings(grid, dropout, weights.heads, weights.epsilon)
    return EncoderFunction.apply(settings, x, *weights.tensors)


@torch.no_grad()
def last_states(x: Tensor, weights: SequenceWeights, grid: SequenceGrid) -> Tensor:
    """Return each user's last hidden state [users, d], without gradients, on the calling thread alone.

    Callers use several threads by calling it for parts of the users.
    """
    grid, memory = grid._replace(slots=grid.slots.contiguous()), Memory()
    settings = SequenceSettings(grid, None, weights.heads, weights.epsilon)
    tensors = [weight.contiguous() for weight in weights.tensors]
    users = of_whole_users(grid, range(0, len(x), MOST_UNTRAINED))
    states, _ = _forward(settings, x.contiguous(), tensors, users, memory, one_by_one=True)
    return states[grid.slots % grid.length == grid.length - 1]


def refusal(weights: SequenceWeights) -> str:
    """Return why the C++ cannot take these weights, or "" if it can."""
    position, *outer = weights.tensors[:OUTER_WEIGHTS]
    blocks = weights.blocks()
    if position.dtype not in DTYPES:
        return "it needs weights of float32 or float64"
    if not 1 <= len(blocks) <= MOST_BLOCKS:
        return f"it needs 1 to {MOST_BLOCKS} blocks, found {len(blocks)}"
    d = position.shape[1]
    f = len(blocks[0].feed_in)
    if d % PANEL or f % PANEL:
        return f"it needs widths that are multiples of {PANEL}, found {d} and {f}"
    square, vector = (d, d), (d,)
    of_block = [square, square, square, square, vector, vector, (f, d), (f,), (d, f), vector, vector, vector]
    if any(weight.shape != vector for weight in outer):
        return "it needs norms as wide as the positions"
    if any([weight.shape for weight in block] != of_block for block in blocks):
        return "it needs blocks of one shape"
    return ""


class SequenceSettings(NamedTuple):
    """The arguments of an encoder that have no gradient."""

    grid: SequenceGrid
    dropout: SequenceDropout | None
    heads: int
    epsilon: float


class EncoderFunction(torch.autograd.Function):
    """The autograd function of `sequence_encoder`."""

    @staticmethod
    def forward(ctx, settings: SequenceSettings, x: Tensor, *weights: Tensor) -> Tensor:
        """Return the hidden states [R, d]; weights in the order of `SequenceWeights`."""
        weights = tuple(weight.contiguous() for weight in weights)
        x, grid, memory = x.contiguous(), settings.grid, Memory()
        users = of_whole_users(grid, [start for start, _ in shares(len(grid.slots), MOST_WORKERS)])
        states, ctx.parts = _forward(settings, x, weights, users, memory)
        ctx.starts = [start for start, _ in users]
        ctx.memory = memory
        ctx.settings = settings  # the parts hold addresses into these and into the saved tensors
        ctx.save_for_backward(x, *weights)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the weights from that of the states [R, d]."""
        x, *weights = ctx.saved_tensors
        upstream, of_x = upstream.contiguous(), torch.empty_like(x)
        sizes = [weight.numel() for weight in weights]
        gradients = []
        parts = [EncoderStruct.from_buffer_copy(part) for part in ctx.parts]
        for start, part in zip(ctx.starts, parts, strict=True):
            gradients.append(x.new_empty(sum(sizes)))  # this part's gradients of all weights, one after the other
            set_gradients(part, places_of(gradients[-1].data_ptr(), sizes, x.dtype))
            part.of_x = of_x[start:].data_ptr()
            part.upstream = upstream[start:].data_ptr()
        share_out(library(x.dtype).sequence_backward, parts, x.dtype)
        (total,) = add_up([gradients])
        return None, of_x, *(gradient.view(weight.shape) for gradient, weight in zip(total.split(sizes), weights))


def _forward(
    settings: SequenceSettings,
    x: Tensor,
    weights: Sequence[Tensor],
    users: Sequence[tuple[int, int]],
    memory: Memory,
    one_by_one: bool = False,
) -> tuple[Tensor, list[EncoderStruct]]:
    """Return the hidden states [R, d], and the C++ call of each part, which the backward uses again.

    Args:
        settings, x, weights: contiguous tensors.
        users: (first row, row after the last) of each part, as `of_whole_users` returns them.
        memory: where the parts' memory is allocated.
        one_by_one: the calling thread computes the parts in turn, in the same memory, so no backward may follow.
    """
    states = torch.empty_like(x)
    blocks = blocks_at([weight.data_ptr() for weight in weights])
    parts = [weights_struct(weights, settings.heads, settings.epsilon, blocks) for _ in users]
    for (start, end), part in zip(users, parts):
        set_rows(part, settings.grid, settings.dropout, start, end)
    sizes = [memory_of(part, x.dtype) for part in parts]
    if one_by_one:
        places = [memory.empty(x.dtype, max(sizes))] * len(parts)
    else:
        places = [memory.empty(x.dtype, size) for size in sizes]
    for (start, _), part, block in zip(users, parts, places):
        part.x = x[start:].data_ptr()
        part.memory = block.data_ptr()
        part.states = states[start:].data_ptr()
        part.memory_size = block.numel()
    share_out(library(x.dtype).sequence_forward, parts, x.dtype, 1 if one_by_one else None)
    return states, parts


def weights_struct(weights: Sequence[Tensor], heads: int, epsilon: float, blocks: ctypes.Array) -> EncoderStruct:
    """Return a C++ call without rows: sizes and addresses of the weights; blocks: the result of `blocks_at`."""
    return EncoderStruct(
        width=weights[0].shape[1],
        hidden=len(weights[OUTER_WEIGHTS + FEED_IN]),
        heads=heads,
        blocks=len(blocks),
        positions=len(weights[0]),
        epsilon=epsilon,
        position=weights[0].data_ptr(),
        scale=weights[1].data_ptr(),
        shift=weights[2].data_ptr(),
        weights=blocks,
    )


def set_rows(part: EncoderStruct, grid: SequenceGrid, dropout: SequenceDropout | None, start: int, end: int) -> None:
    """Set the rows of a C++ call, from `start` to before `end`, and its dropout."""
    part.rows = end - start
    part.length = grid.length
    part.user_count = grid.users
    part.slots = grid.slots.data_ptr() + start * grid.slots.element_size()
    part.drops = dropout is not None
    if dropout is not None:
        part.prefix = dropout.prefix
        part.threshold = dropout.threshold
        part.keep_scale = dropout.scale
        part.users = dropout.users.data_ptr()


def set_gradients(part: EncoderStruct, places: Sequence[int]) -> None:
    """Set the addresses to which a C++ call writes the gradients of the weights, in their order."""
    part.of_position, part.of_scale, part.of_shift = places[:OUTER_WEIGHTS]
    part.of_weights = blocks_at(places)


def memory_of(part: EncoderStruct, dtype: torch.dtype) -> int:
    """Return how many numbers of memory a part needs. Raises ValueError if its sizes do not fit together."""
    measure = library(dtype).sequence_memory
    measure.restype = ctypes.c_int64
    numbers = measure(ctypes.byref(part))
    if numbers < 0:
        raise wrong_sizes("sequence_memory", part)
    return numbers


def blocks_at(places: Sequence[int]) -> ctypes.Array:
    """Return a C array of the blocks' structs, given the addresses of all weights in their order."""
    blocks = [places[i : i + BLOCK_WEIGHTS] for i in range(OUTER_WEIGHTS, len(places), BLOCK_WEIGHTS)]
    return (EncoderBlockStruct * len(blocks))(*(EncoderBlockStruct(*block) for block in blocks))


def places_of(first: int, sizes: Sequence[int], dtype: torch.dtype) -> list[int]:
    """Return the addresses of tensors of these sizes that follow one another, the first at address `first`."""
    return [first + dtype.itemsize * before for before in accumulate(sizes[:-1], initial=0)]


def of_whole_users(grid: SequenceGrid, starts: Iterable[int]) -> list[tuple[int, int]]:
    """Divide the rows into parts of whole users; return (first row, row after the last) of each part.

    A part begins at each row of `starts`, moved back to the first row of its user.
    """
    slots = grid.slots.numpy()
    length = grid.length
    cuts = sorted({0, *(bisect_left(slots, slots[start] // length * length) for start in starts if start), len(slots)})
    return list(zip(cuts, cuts[1:])) or [(0, 0)]


class SequenceEncoderCalls:
    """The op as a pair of a step. Each worker takes the rows of some users and writes its part of the gradients.

    Attributes: states [rows, d]; of_inputs [rows, d], the gradient of the item vector that each row reads.
    """

    def __init__(
        self, calls: StepCalls, weights: RecommenderWeights, gradients: RecommenderWeights, vectors: Output
    ) -> None:
        """Allocate the memory; vectors [items, d]: the item vectors.

        Raises ValueError if the gradients of the sequence encoder are not views of one flat buffer.
        """
        sequence = weights.sequence
        d = vectors.tensor.shape[1]
        self._calls = calls
        self._vectors = vectors
        self._of_states = vectors
        self._x = calls.empty(calls.rows, d)
        self.states = Output(calls.empty(calls.rows, d))
        self.of_inputs = Output(calls.empty(calls.rows, d))
        self._rows = RowsStruct(width=d)
        self._rows.vectors, self._rows.x = addresses([vectors.tensor, self._x])
        self._parts = GradientParts(gradients.sequence.tensors)
        self._memory = [calls.empty(0)] * MOST_WORKERS
        common = sequence.tensors, sequence.heads, sequence.epsilon, blocks_at(addresses(sequence.tensors))
        self._structs = [weights_struct(*common) for _ in range(MOST_WORKERS)]
        for worker, struct in enumerate(self._structs):
            set_gradients(struct, self._parts.places(worker))

    def connect(self, of_states: Output) -> None:
        """Set the tensor [rows, d] from which the backward reads the gradient of the states."""
        self._of_states = of_states

    def forward(self) -> None:
        """Schedule the gathering of the rows' item vectors and the states of the current batch."""
        batch = self._calls.batch
        rows = self._rows
        rows.rows = len(batch.inputs)
        rows.items = len(batch.distinct)
        rows.inputs = batch.inputs.data_ptr()
        self._cut(batch.grid, batch.dropout)
        gathered = self._calls.add("gather_rows", [rows], self._vectors.done)
        self.states.done = self._calls.add("sequence_forward", self._working, gathered)

    def backward(self) -> None:
        """Schedule the gradients of the encoder's weights, and of each row's item vector."""
        self.of_inputs.done = self._calls.add("sequence_backward", self._working, self._of_states.done)
        self._parts.add_up(self._calls, len(self._working), self.of_inputs.done)

    def _cut(self, grid: SequenceGrid, dropout: SequenceDropout | None) -> None:
        """Divide the users among the workers and set their calls; a worker's memory grows if it is too small."""
        users = of_whole_users(grid, [start for start, _ in shares(len(grid.slots), MOST_WORKERS)])
        self._working = self._structs[: len(users)]
        size = self._x.stride(0) * self._x.element_size()  # bytes of a row
        places = {"x": self._x, "states": self.states.tensor}
        places |= {"upstream": self._of_states.tensor, "of_x": self.of_inputs.tensor}
        for worker, (struct, (start, end)) in enumerate(zip(self._working, users)):
            set_rows(struct, grid, dropout, start, end)
            for name, tensor in places.items():
                setattr(struct, name, tensor.data_ptr() + start * size)
            needed = memory_of(struct, self._calls.dtype)
            if self._memory[worker].numel() < needed:
                self._memory[worker] = self._calls.empty(needed + needed // 8)
            struct.memory = self._memory[worker].data_ptr()
            struct.memory_size = self._memory[worker].numel()
