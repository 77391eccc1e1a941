"""SASRec in Triton for the public op: rows on a grid of users and positions, differentiable once.

Each user's rows go to one tile. The layout is computed on the device, so the host does not wait for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import FLAT_ALIGNMENT, HEADER, HEADER_WORDS, TILE_ROWS, SequenceDropout, SequenceGrid, SequenceWeights
from .launch import fit_range
from .sequence_encoder import Activations, DropoutRate, EncoderLaunches, EncoderSizes, Rows


def sequence_encoder(
    x: Tensor, weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout | None
) -> Tensor:
    """Return the hidden states [R, d], differentiable once; `refusal` must return "" for the weights.

    Rows that share a slot, as padding rows of a batch do, get the state of the first of them; only it gets a gradient.
    """
    may_follow = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights.tensors))
    states, *_ = _sequence_states(x, *_arguments(x, weights, grid, dropout), may_follow)
    return states


def last_states(x: Tensor, weights: SequenceWeights, grid: SequenceGrid) -> Tensor:
    """Return each user's last hidden state [users, d], without gradients."""
    return _last_states(x, *_arguments(x, weights, grid, None))


def _arguments(x: Tensor, weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout | None) -> tuple:
    """Return the arguments of the custom ops after x, in the order of `GridCall`: flat weights, grid, settings."""
    flat = torch.cat([F.pad(weight.reshape(-1), (0, -weight.numel() % FLAT_ALIGNMENT)) for weight in weights.tensors])
    sizes = (len(weights.tensors[0]), len(weights.blocks()), weights.heads, weights.epsilon)
    where = (grid.slots.contiguous(), grid.users, grid.length, *sizes)
    if dropout is None:
        return flat, None, None, *where, 0, 1.0
    prefix = dropout.prefix
    if not isinstance(prefix, Tensor):
        prefix = torch.full((), prefix, dtype=torch.int64, device=x.device)
    return flat, dropout.users, prefix, *where, dropout.threshold, dropout.scale


class GridCall(NamedTuple):
    """The arguments of the custom ops after x; users and prefix are None without dropout."""

    flat: Tensor  # flat weights, 1-D
    users: Tensor | None  # int64 [users]: the user numbers that enter dropout's hash
    prefix: Tensor | None  # int64 scalar: the hash of seed and step
    slots: Tensor  # int64 [R]
    user_count: int
    length: int
    positions: int
    blocks: int
    heads: int
    epsilon: float
    threshold: int  # of `DropoutRate`
    scale: float

    @property
    def tile_rows(self) -> int:
        """Return the rows of a user's tile: the smallest of `TILE_ROWS` that holds a history."""
        return next(rows for rows in TILE_ROWS if rows >= self.length)

    def sizes(self, x: Tensor) -> EncoderSizes:
        """Return the sizes of the encoder for x [R, d]."""
        rate = None if self.users is None else DropoutRate(self.threshold, self.scale)
        of_model = (self.positions, x.shape[1], self.heads, self.blocks, self.epsilon)
        return EncoderSizes(*of_model, self.tile_rows, rate, x.dtype)

    def rows(self) -> Rows:
        """Return the rows laid out in tiles, one tile for each user; `inputs` are row numbers of x."""
        device = self.slots.device
        count = self.user_count
        user = torch.arange(count, device=device).repeat_interleave(self.tile_rows, output_size=count * self.tile_rows)
        column = torch.arange(self.tile_rows, device=device).repeat(count)
        slot = user * self.length + column
        row = torch.searchsorted(self.slots, slot)
        is_row = column < self.length
        if len(self.slots):
            is_row &= self.slots[row.clamp(max=len(self.slots) - 1)] == slot
        else:
            is_row = torch.zeros_like(is_row)
        header = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=device)
        header[HEADER.index("tiles")].fill_(count)
        if self.prefix is not None:
            header[HEADER.index("prefix")].copy_(self.prefix)
        numbers = header if self.users is None else self.users.to(torch.int32)
        inputs = torch.where(is_row, row, -1)
        positions = torch.where(is_row, column + self.positions - self.length, 0)
        row_users = torch.where(is_row, user, count)
        return Rows(header, *(field.to(torch.int32) for field in (inputs, row_users, positions)), numbers)

    def tile_places(self) -> Tensor:
        """Return the row number in the tiles of each row of x, int64 [R]."""
        return self.slots // self.length * self.tile_rows + self.slots % self.length

    def launches(self, x: Tensor, rows: Rows) -> EncoderLaunches:
        """Return the launches over the tiles `rows`, with matrix products in the dtype of x."""
        flat = self.flat.contiguous()
        return EncoderLaunches(self.sizes(x), rows, flat.to(x.dtype), flat.float())


@torch.library.custom_op("iisan_fast::sequence_states", mutates_args=())
def _sequence_states(
    x: Tensor,
    flat: Tensor,
    users: Tensor | None,
    prefix: Tensor | None,
    slots: Tensor,
    user_count: int,
    length: int,
    positions: int,
    blocks: int,
    heads: int,
    epsilon: float,
    threshold: int,
    scale: float,
    may_follow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the states [R, d] and the four `Activations`, which are empty unless may_follow (a backward)."""
    call = GridCall(flat, users, prefix, slots, user_count, length, positions, blocks, heads, epsilon, threshold, scale)
    launches = call.launches(x, call.rows())
    activations = launches.activations() if may_follow else None
    states = launches.empty(user_count * call.tile_rows, x.shape[1])
    launches.forward(x.contiguous(), states, states, activations)
    states = states.index_select(0, call.tile_places()).to(x.dtype)
    return states, *(activations or (x.new_empty(0) for _ in Activations._fields))


@_sequence_states.register_fake
def _(
    x, flat, users, prefix, slots, user_count, length, positions, blocks, heads, epsilon, threshold, scale, may_follow
):
    """Return empty tensors with the shapes and dtypes of `_sequence_states`."""
    call = GridCall(flat, users, prefix, slots, user_count, length, positions, blocks, heads, epsilon, threshold, scale)
    states = x.new_empty(x.shape)
    if not may_follow:
        return states, *(x.new_empty(0) for _ in Activations._fields)
    rows = Rows(*(slots.new_empty(user_count * call.tile_rows) for _ in Rows._fields))
    return states, *EncoderLaunches(call.sizes(x), rows, flat, flat).activations()


@torch.library.custom_op("iisan_fast::last_states", mutates_args=())
def _last_states(
    x: Tensor,
    flat: Tensor,
    users: Tensor | None,
    prefix: Tensor | None,
    slots: Tensor,
    user_count: int,
    length: int,
    positions: int,
    blocks: int,
    heads: int,
    epsilon: float,
    threshold: int,
    scale: float,
) -> Tensor:
    """Return the states [users, d] of the last position; nothing is stored for a backward."""
    call = GridCall(flat, users, prefix, slots, user_count, length, positions, blocks, heads, epsilon, threshold, scale)
    launches = call.launches(x, call.rows())
    states = launches.empty(user_count, call.tile_rows, x.shape[1])
    launches.forward(x.contiguous(), states, states, None)
    return states[:, length - 1].to(x.dtype, memory_format=torch.contiguous_format, copy=True)


@_last_states.register_fake
def _(x, flat, users, prefix, slots, user_count, length, positions, blocks, heads, epsilon, threshold, scale):
    """Return empty tensors with the shapes and dtypes of `_last_states`."""
    return x.new_empty(user_count, x.shape[1])


@torch.library.custom_op("iisan_fast::sequence_states_backward", mutates_args=())
def _sequence_states_backward(
    gradient: Tensor,
    activations: list[Tensor],
    x: Tensor,
    flat: Tensor,
    users: Tensor | None,
    prefix: Tensor | None,
    slots: Tensor,
    user_count: int,
    length: int,
    positions: int,
    blocks: int,
    heads: int,
    epsilon: float,
    threshold: int,
    scale: float,
    of_x: bool,
    of_flat: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [R, d] and of the flat weights in their dtypes; empty unless of_x, of_flat."""
    call = GridCall(flat, users, prefix, slots, user_count, length, positions, blocks, heads, epsilon, threshold, scale)
    rows = call.rows()
    launches = call.launches(x, rows)
    gradient, factor = fit_range(gradient, x.dtype)
    of_states = launches.empty(len(rows.inputs), x.shape[1])
    if len(slots):
        of_states = gradient.index_select(0, rows.inputs.clamp(min=0)).float()
    memory = Activations(*activations), launches.cotangents()
    launches.backward(of_states, *memory)
    gradients = [x.new_empty(0), flat.new_empty(0)]
    if of_x:
        places = call.tile_places()
        is_first = rows.inputs[places] == torch.arange(len(x), device=x.device)
        gradients[0] = memory[1].of_inputs[places] * is_first[:, None]
    if of_flat:
        gradients[1] = launches.empty(flat.numel())
        launches.weight_gradients(*memory, launches.parts(), gradients[1])
    scaled = gradients if factor is None else [value / factor for value in gradients]
    return scaled[0].to(x.dtype), scaled[1].to(flat.dtype)


@_sequence_states_backward.register_fake
def _(gradient, activations, x, flat, *settings):
    """Return empty tensors with the shapes and dtypes of `_sequence_states_backward`."""
    *_, of_x, of_flat = settings
    return x.new_empty(x.shape if of_x else 0), flat.new_empty(flat.shape if of_flat else 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save the tensors and settings that `_backward` needs."""
    x, flat, users, prefix, slots, *ctx.settings, _ = inputs
    _, *activations = output
    ctx.mark_non_differentiable(*activations)
    ctx.save_for_backward(x, flat, users, prefix, slots, *activations)


def _backward(ctx: Any, gradient: Tensor, *_: None) -> tuple:
    """Return the gradients of x and the flat weights from that of the states; None for other arguments."""
    x, flat, users, prefix, slots, *activations = ctx.saved_tensors
    of_x, of_flat = ctx.needs_input_grad[:2]
    gradients = _sequence_states_backward(
        gradient, activations, x, flat, users, prefix, slots, *ctx.settings, of_x, of_flat
    )
    wanted = [value if need else None for value, need in zip(gradients, (of_x, of_flat))]
    return *wanted, *(None,) * (len(ctx.needs_input_grad) - 2)


_sequence_states.register_autograd(_backward, setup_context=_setup_context)
