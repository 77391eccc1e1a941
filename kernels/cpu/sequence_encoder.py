"""SASRec on a CPU by C++: `cpp/sequence_encoder.cpp`, in training each worker with the rows of some users."""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import shares
from .library import DTYPES, PANEL, library, share_out
from .step_memory import Memory
from .sums import add_up

MOST_BLOCKS = 64
MOST_WORKERS = 4  # each has gradients of all weights, which are added up
MOST_UNTRAINED = 512  # rows at a time where no backward follows, or one user's: each takes some 10 KB
OUTER = 3  # weights before the blocks' own
BLOCK = 12  # weights of a block
GRADIENTS = ("of_position", "of_scale", "of_shift")  # of the outer weights
FEED_IN = 6  # the place of the feed-forward's first weight among them


class SequenceGrid(NamedTuple):
    """Where packed rows stand: on a grid of users and positions."""

    slots: Tensor  # int64 [R] ascending: user * length + position
    length: int  # positions of the grid


class SequenceDropout(NamedTuple):
    """A step's stateless dropout, as `iisan_fast.kernels.reference.dropout` defines its hash."""

    prefix: int  # the hash of seed and step
    threshold: int  # of 2^32: hashes below it drop
    scale: float  # of what is kept
    users: Tensor  # int64: the numbers of the grid's users


class SequenceWeights(NamedTuple):
    """SASRec's weights: position [P, d], scale and shift [d] of the first norm; then for each block query, key, value,
    output [d, d], scale and shift of a norm [d], feed-forward [f, d], [f], [d, f], [d], scale and shift of a norm."""

    tensors: list[Tensor]
    heads: int
    epsilon: float  # of the norms


def sequence_encoder(
    x: Tensor, weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout | None
) -> Tensor:
    """SASRec's states [R, d] after each of the rows x [R, d] of right-aligned histories, for weights that `takes`
    accepts. Not differentiable twice."""
    grid = grid._replace(slots=grid.slots.contiguous())
    dropout = dropout and dropout._replace(users=dropout.users.contiguous())
    settings = _Settings(grid, dropout, weights.heads, weights.epsilon)
    return _Encoder.apply(settings, x, *weights.tensors)


@torch.no_grad()
def last_states(x: Tensor, weights: SequenceWeights, grid: SequenceGrid) -> Tensor:
    """The states [users, d] after each user's whole history, where no backward follows and nothing drops; every history
    holds an item. By this thread alone: callers share their users out."""
    grid, memory = grid._replace(slots=grid.slots.contiguous()), Memory()
    settings = _Settings(grid, None, weights.heads, weights.epsilon)
    own = [weight.contiguous() for weight in weights.tensors]
    users = of_whole_users(grid, range(0, len(x), MOST_UNTRAINED))
    states, _ = _forward(settings, x.contiguous(), own, users, memory, one_by_one=True)
    return states[grid.slots % grid.length == grid.length - 1]


def takes(weights: SequenceWeights) -> bool:
    """Whether the C++ knows these shapes and this dtype."""
    position, *outer = weights.tensors[:OUTER]
    blocks = [weights.tensors[i : i + BLOCK] for i in range(OUTER, len(weights.tensors), BLOCK)]
    if not 1 <= len(blocks) <= MOST_BLOCKS or position.dtype not in DTYPES:
        return False
    d, f = position.shape[1], len(blocks[0][FEED_IN])
    square, vector = (d, d), (d,)
    of_block = [square, square, square, square, vector, vector, (f, d), (f,), (d, f), vector, vector, vector]
    return (
        d % PANEL == 0
        and f % PANEL == 0
        and all(each.shape == vector for each in outer)
        and all([each.shape for each in block] == of_block for block in blocks)
    )


class _Settings(NamedTuple):
    grid: SequenceGrid
    dropout: SequenceDropout | None
    heads: int
    epsilon: float


class _Block(ctypes.Structure):
    """`Block` of cpp/sequence_encoder.cpp."""

    _fields_ = [(f"weight_{i}", ctypes.c_void_p) for i in range(BLOCK)]


class _Arguments(ctypes.Structure):
    """`Encoder` of cpp/sequence_encoder.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "width", "hidden", "heads")),
        *((name, ctypes.c_int32) for name in ("blocks", "length", "positions", "drops")),
        *((name, ctypes.c_void_p) for name in ("slots", "users")),
        *((name, ctypes.c_uint32) for name in ("prefix", "threshold")),
        *((name, ctypes.c_double) for name in ("keep_scale", "epsilon")),
        *((name, ctypes.c_void_p) for name in ("x", "position", "scale", "shift")),
        ("weights", ctypes.POINTER(_Block)),
        *((name, ctypes.c_void_p) for name in ("states", "memory", "upstream")),
        *((name, ctypes.c_void_p) for name in ("of_x", *GRADIENTS)),
        ("of_weights", ctypes.POINTER(_Block)),
    ]


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: _Settings, x: Tensor, *weights: Tensor) -> Tensor:
        weights = tuple(weight.contiguous() for weight in weights)
        x, grid, memory = x.contiguous(), settings.grid, Memory()
        users = of_whole_users(grid, [start for start, _ in shares(len(grid.slots), MOST_WORKERS)])
        states, ctx.parts = _forward(settings, x, weights, users, memory)
        ctx.starts = [start for start, _ in users]
        ctx.memory, ctx.settings = memory, settings  # what the parts point to, with these:
        ctx.save_for_backward(x, *weights)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        upstream, of_x = upstream.contiguous(), torch.empty_like(x)
        sizes = [weight.numel() for weight in weights]
        found, parts = [], [_Arguments.from_buffer_copy(part) for part in ctx.parts]
        for start, part in zip(ctx.starts, parts, strict=True):
            found.append(x.new_empty(sum(sizes)))  # the gradients of all weights, one after the other
            set_gradients(part, places_of(found[-1].data_ptr(), sizes, x.dtype))
            part.of_x, part.upstream = of_x[start:].data_ptr(), upstream[start:].data_ptr()
        backward = library(x.dtype).sequence_backward
        share_out(backward, parts, x.dtype)
        (total,) = add_up([found])
        return None, of_x, *(own.view(weight.shape) for own, weight in zip(total.split(sizes), weights))


def _forward(
    settings: _Settings,
    x: Tensor,
    weights: Sequence[Tensor],
    users: Sequence[tuple[int, int]],
    memory: Memory,
    one_by_one: bool = False,
) -> tuple[Tensor, list[_Arguments]]:
    """(the states, what the backward of each of the parts takes); users: as `of_whole_users` finds them. One by one,
    parts are computed by this thread, in the same memory, and no backward may follow."""
    states = torch.empty_like(x)
    blocks = blocks_at([weight.data_ptr() for weight in weights])
    parts = [of_weights(weights, settings.heads, settings.epsilon, blocks) for _ in users]
    for (start, end), part in zip(users, parts):
        set_rows(part, settings.grid, settings.dropout, start, end)
    sizes = [memory_of(part, x.dtype) for part in parts]
    own = [memory.empty(x.dtype, max(sizes))] * len(parts) if one_by_one else [memory.empty(x.dtype, n) for n in sizes]
    for (start, _), part, block in zip(users, parts, own):
        part.x, part.memory, part.states = x[start:].data_ptr(), block.data_ptr(), states[start:].data_ptr()
    share_out(library(x.dtype).sequence_forward, parts, x.dtype, 1 if one_by_one else None)
    return states, parts


def of_weights(weights: Sequence[Tensor], heads: int, epsilon: float, blocks: ctypes.Array) -> _Arguments:
    """What the rows have no part in; blocks: pointers to those of the weights that are theirs."""
    return _Arguments(
        width=weights[0].shape[1],
        hidden=len(weights[OUTER + FEED_IN]),
        heads=heads,
        blocks=len(blocks),
        positions=len(weights[0]),
        epsilon=epsilon,
        position=weights[0].data_ptr(),
        scale=weights[1].data_ptr(),
        shift=weights[2].data_ptr(),
        weights=blocks,
    )


def set_rows(part: _Arguments, grid: SequenceGrid, dropout: SequenceDropout | None, start: int, end: int) -> None:
    """Some rows of a grid."""
    part.rows, part.length = end - start, grid.length
    part.slots = grid.slots.data_ptr() + start * grid.slots.element_size()
    part.drops = dropout is not None
    if dropout is not None:
        part.prefix, part.threshold, part.keep_scale = dropout.prefix, dropout.threshold, dropout.scale
        part.users = dropout.users.data_ptr()


def set_gradients(part: _Arguments, places: Sequence[int]) -> None:
    """Where the gradient of each of the weights goes."""
    part.of_position, part.of_scale, part.of_shift = places[:OUTER]
    part.of_weights = blocks_at(places)


def memory_of(part: _Arguments, dtype: torch.dtype) -> int:
    """Numbers that the forward of a part leaves for its backward, and both need to work in."""
    measure = library(dtype).sequence_memory
    measure.restype = ctypes.c_int64
    return measure(ctypes.byref(part))


def blocks_at(places: Sequence[int]) -> ctypes.Array:
    """Pointers to the blocks' weights, from those to all weights."""
    own = [places[i : i + BLOCK] for i in range(OUTER, len(places), BLOCK)]
    return (_Block * len(own))(*(_Block(*block) for block in own))


def places_of(first: int, sizes: Sequence[int], dtype: torch.dtype) -> list[int]:
    """The address of each of some weights that stand one after the other."""
    return [first + dtype.itemsize * before for before in accumulate(sizes[:-1], initial=0)]


def of_whole_users(grid: SequenceGrid, starts: Iterable[int]) -> list[tuple[int, int]]:
    """(first row, row after the last) of each part: they begin at these rows, moved to where a user begins."""
    slots, length = grid.slots.numpy(), grid.length
    cuts = sorted({0, *(bisect_left(slots, slots[start] // length * length) for start in starts if start), len(slots)})
    return list(zip(cuts, cuts[1:])) or [(0, 0)]
