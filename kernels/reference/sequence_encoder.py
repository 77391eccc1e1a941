"""SASRec over packed histories: the specification.

Histories are packed into rows [R, d] without padding. Only attention spreads them over a grid [users, length].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import SITES_PER_BLOCK, EncoderBlock, SequenceDropout, SequenceGrid, SequenceWeights
from .dropout import drop_factors


def sequence_encoder(
    x: Tensor, weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout | None
) -> Tensor:
    """Return the hidden states [R, d] of rows x [R, d]; row r sees the rows of its user up to r. Differentiable."""
    positions = _positions(weights, grid)
    x = _with_positions(x, weights, positions)
    input_factors, *block_factors = _drop_factors(x, weights, grid, positions, dropout)
    x = x * input_factors
    hidden = _hidden_keys(grid)
    for block, factors in zip(weights.blocks(), block_factors):
        x = _block(x, block, weights, grid, hidden, factors)
    return x


def last_states(x: Tensor, weights: SequenceWeights, grid: SequenceGrid) -> Tensor:
    """Return the hidden state [users, d] of each user's last row, without dropout; every user has a row."""
    x, hidden = _with_positions(x, weights, _positions(weights, grid)), _hidden_keys(grid)
    *first, last = weights.blocks()
    for block in first:
        x = _block(x, block, weights, grid, hidden, UNDROPPED)
    queries, keys, values = _heads(_on_grid(_projections(x, last), grid), weights.heads)
    attended = _weighted_values(queries[:, :, -1:], keys, values, hidden[:, :, -1:], 1.0).reshape(grid.users, -1)
    x = x[(grid.slots % grid.length == grid.length - 1).nonzero()[:, 0]]
    return _after_attention(x, attended, last, weights.epsilon, UNDROPPED)


class BlockFactors(NamedTuple):
    """The dropout factors of a block: 0 or 1 / (1 - probability), or 1.0 for no dropout."""

    weights: Tensor | float  # [users, heads, L, L]: of the attention weights
    attended: Tensor | float  # [R, d]: of the attention's output
    fed: Tensor | float  # [R, d]: of the feed-forward's output


UNDROPPED = BlockFactors(1.0, 1.0, 1.0)


def _positions(weights: SequenceWeights, grid: SequenceGrid) -> Tensor:
    """Return each row's index [R] into the model's positions; the last item of a history has the last position."""
    return grid.slots % grid.length + len(weights.tensors[0]) - grid.length


def _with_positions(x: Tensor, weights: SequenceWeights, positions: Tensor) -> Tensor:
    """Return x [R, d] plus the vectors of its positions, normalised by the first layer norm."""
    position, scale, shift = weights.tensors[:3]
    # A product with one-hot rows instead of a lookup: its gradient is a product too, not a scatter.
    one_hot = positions[:, None] == torch.arange(len(position), device=x.device)
    return F.layer_norm(x + one_hot.to(x.dtype) @ position, scale.shape, scale, shift, weights.epsilon)


def _hidden_keys(grid: SequenceGrid) -> Tensor:
    """Return bool [users, 1, L, L]: True for keys to mask, which are later than the query, or padding.

    A query always sees its own key; with all keys masked its softmax would be NaN.
    """
    slots = grid.slots
    length = grid.length
    empty = torch.ones(grid.users * length, dtype=torch.bool, device=slots.device).index_fill(0, slots, False)
    later = torch.ones(length, length, dtype=torch.bool, device=slots.device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=slots.device)
    return ((later | empty.view(-1, 1, length)) & ~itself)[:, None]


def _block(
    x: Tensor, block: EncoderBlock, weights: SequenceWeights, grid: SequenceGrid, hidden: Tensor, factors: BlockFactors
) -> Tensor:
    """Return a post-norm transformer block's output [R, d] for the packed rows x [R, d].

    hidden: bool [users, 1, L, L], True for keys that a query must not see.
    """
    projections = _on_grid(_projections(x, block), grid)
    weighted = _weighted_values(*_heads(projections, weights.heads), hidden, factors.weights)
    attended = weighted.transpose(1, 2).reshape(grid.users, grid.length, -1)
    return _after_attention(x, _Collect.apply(attended.flatten(0, 1), grid.slots), block, weights.epsilon, factors)


def _after_attention(x: Tensor, attended: Tensor, block: EncoderBlock, epsilon: float, factors: BlockFactors) -> Tensor:
    """Return a block's output [R, d] from its input x and its attended values: projection, norms, feed-forward."""
    shape = block.attention_scale.shape
    x = x + F.linear(attended, block.output) * factors.attended
    x = F.layer_norm(x, shape, block.attention_scale, block.attention_shift, epsilon)
    fed = F.linear(F.relu(F.linear(x, block.feed_in, block.feed_in_bias)), block.feed_out, block.feed_out_bias)
    return F.layer_norm(x + fed * factors.fed, shape, block.feed_scale, block.feed_shift, epsilon)


def _projections(x: Tensor, block: EncoderBlock) -> Tensor:
    """Return queries, keys and values side by side: [R, 3d]."""
    return F.linear(x, torch.cat([block.query, block.key, block.value]))


def _on_grid(x: Tensor, grid: SequenceGrid) -> Tensor:
    """Spread rows [R, C] over the grid [users, length, C]; slots without a row are 0."""
    return _Spread.apply(x, grid.slots, grid.users * grid.length).view(grid.users, grid.length, -1)


def _heads(projections: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split projections [users, L, 3d] into queries, keys and values, each [users, heads, L, d / heads]."""
    users, length, _ = projections.shape
    return tuple(projections.view(users, length, 3, heads, -1).permute(2, 0, 3, 1, 4))


def _weighted_values(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, factors: Tensor | float) -> Tensor:
    """Return scaled dot-product attention [users, heads, queries, d / heads]; factors: dropout of the weights."""
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) * factors) @ values


def _drop_factors(
    x: Tensor, weights: SequenceWeights, grid: SequenceGrid, positions: Tensor, dropout: SequenceDropout | None
) -> list:
    """Return the input's dropout factors, then the `BlockFactors` of each block; all 1.0 if there is no dropout."""
    blocks = len(weights.blocks())
    if dropout is None:
        return [1.0] + [UNDROPPED] * blocks
    # Sites (-1, 0, 1), (2, 3, 4) ...: columns 0 and 1 are sites of rows (-1 is none), column 2 of attention weights.
    sites = torch.arange(-1, 2 + SITES_PER_BLOCK * blocks, device=x.device).view(blocks + 1, SITES_PER_BLOCK)
    users = dropout.users[grid.slots // grid.length]
    channels = torch.arange(x.shape[1], device=x.device)
    by_row = drop_factors(dropout, sites[:, :2].flatten()[1:], users, positions, channels, x.dtype)
    of_weights = _weight_factors(weights, grid, dropout, sites[:-1, 2], x.dtype)
    return [by_row[0], *map(BlockFactors, of_weights, by_row[1::2], by_row[2::2])]


def _weight_factors(
    weights: SequenceWeights, grid: SequenceGrid, dropout: SequenceDropout, sites: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the dropout factors of all attention weights, [blocks, users, heads, queries L, keys L], in `dtype`.

    sites int64 [blocks]: the dropout site of each block's attention weights. The hashed channel is head * P + the key's
    position, where P is the number of the model's positions.
    """
    users = grid.users
    length = grid.length
    heads = weights.heads
    most = len(weights.tensors[0])
    positions = torch.arange(most - length, most, device=sites.device)
    channels = torch.cat([head * most + positions for head in range(heads)])
    numbers = dropout.users.repeat_interleave(length, output_size=users * length)
    factors = drop_factors(dropout, sites, numbers, positions.repeat(users), channels, dtype)
    return factors.view(-1, users, length, heads, length).transpose(2, 3)


class _Spread(torch.autograd.Function):
    """Copy rows to their slots. Slots differ, so forward and backward are copies and repeat bit for bit."""

    @staticmethod
    def forward(ctx, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        """Return [count, C] with row i of rows [R, C] at slots[i], 0 elsewhere."""
        ctx.save_for_backward(slots)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient's rows at the slots."""
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Copy slots to rows, the inverse of `_Spread`."""

    @staticmethod
    def forward(ctx, grid: Tensor, slots: Tensor) -> Tensor:
        """Return the rows [R, C] of grid [count, C] at the slots."""
        ctx.save_for_backward(slots)
        ctx.count = len(grid)
        return grid.index_select(0, slots)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """Return [count, C] with the gradient's rows at the slots, 0 elsewhere."""
        (slots,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, gradient.shape[1]).index_copy_(0, slots, gradient), None
