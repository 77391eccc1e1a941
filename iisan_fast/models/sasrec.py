"""SASRec: a small causal transformer over item vectors. Histories come packed: rows, and where they stand.

All that works row by row sees real rows only; attention alone spreads them over a grid of users and positions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from ..kernels.reference.dropout import StatelessDropout

NORM_EPSILON = 1e-6
SITES_PER_BLOCK = 3  # of dropout: attention weights, after attention, after the feed-forward; site 0 is the input


class Rows(NamedTuple):
    """Where R packed rows stand: right-aligned histories on a grid of users and positions."""

    slots: Tensor  # int64 [R], ascending: user * length + position; padding rows of a batch may share one
    users: int  # of the grid
    length: int  # positions of the grid, at most the model's

    def on_grid(self, x: Tensor) -> Tensor:
        """Rows [R, C] -> [users, length, C], zero where there is none."""
        return _Spread.apply(x, self.slots, self.users * self.length).view(self.users, self.length, -1)

    def off_grid(self, x: Tensor) -> Tensor:
        """The grid [users, length, C] -> rows [R, C]."""
        return _Collect.apply(x.flatten(0, 1), self.slots)


class Dropout(NamedTuple):
    """One step's dropout of a batch: its hash, and the numbers of the grid's users."""

    masks: StatelessDropout
    users: Tensor  # int64 [users]

    def hashed(self) -> kernels.SequenceDropout | None:
        """What C++ takes, or None where nothing drops."""
        if not self.masks.threshold:
            return None
        return kernels.SequenceDropout(int(self.masks.prefix), self.masks.threshold, self.masks.scale, self.users)


class _Drops(NamedTuple):
    """A block's dropout factors."""

    weights: Tensor | float  # [users, heads, L, L]
    attended: Tensor | float  # [R, d]
    fed: Tensor | float  # [R, d]


NO_DROPS = _Drops(1.0, 1.0, 1.0)


class Block(nn.Module):
    """A post-norm transformer block: attention without biases, then a ReLU feed-forward of 4d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.embedding_dim
        self.heads = config.attention_heads
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.attention_norm = nn.LayerNorm(d, eps=NORM_EPSILON)
        self.feed_in = nn.Linear(d, 4 * d)
        self.feed_out = nn.Linear(4 * d, d)
        self.feed_norm = nn.LayerNorm(d, eps=NORM_EPSILON)

    def forward(self, x: Tensor, rows: Rows, hidden: Tensor, drops: _Drops) -> Tensor:
        """x [R, d]; hidden bool [users, 1, L, L]: which keys a query may not see; drops: this block's, or ones."""
        attended = rows.off_grid(self._attend(rows.on_grid(self._projections(x)), hidden, drops.weights))
        return self._rest(x, attended, drops)

    def last(self, x: Tensor, rows: Rows, hidden: Tensor) -> Tensor:
        """`forward` for the last position of every user alone, which has to be real: [users, d]."""
        users, length = rows.users, rows.length
        q, k, v = self._heads(rows.on_grid(self._projections(x)))
        attended = self._weighted(q[:, :, -1:], k, v, hidden[:, :, -1:], 1.0).reshape(users, -1)
        last = x[(rows.slots % length == length - 1).nonzero()[:, 0]]
        return self._rest(last, attended, NO_DROPS)

    def _rest(self, x: Tensor, attended: Tensor, drops: _Drops) -> Tensor:
        """What works row by row once each has attended."""
        x = self.attention_norm(x + self.output(attended) * drops.attended)
        fed = self.feed_out(F.relu(self.feed_in(x)))
        return self.feed_norm(x + fed * drops.fed)

    def _projections(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side: [R, 3d]."""
        return F.linear(x, torch.cat([self.query.weight, self.key.weight, self.value.weight]))

    def _heads(self, projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[users, L, 3d] -> queries, keys and values [users, heads, L, d / heads]."""
        users, length, _ = projections.shape
        return tuple(projections.view(users, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4))

    def _attend(self, projections: Tensor, hidden: Tensor, factors: Tensor | float) -> Tensor:
        """[users, L, 3d] -> [users, L, d]."""
        weighted = self._weighted(*self._heads(projections), hidden, factors)
        return weighted.transpose(1, 2).reshape(*projections.shape[:2], -1)

    def _weighted(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, factors: Tensor | float) -> Tensor:
        """The values as each query weights them: [users, heads, queries, d / heads]."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) * factors) @ v


class SASRec(nn.Module):
    """The sequence encoder (Kang and McAuley 2018, as IISAN configures it)."""

    def __init__(self, config: ModelConfig, max_inputs: int) -> None:
        super().__init__()
        self.max_inputs = max_inputs
        self.position = nn.Parameter(torch.empty(max_inputs, config.embedding_dim))
        self.norm = nn.LayerNorm(config.embedding_dim, eps=NORM_EPSILON)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self._initialise()
        first = range(1, 1 + SITES_PER_BLOCK * config.blocks, SITES_PER_BLOCK)
        row_sites = [0, *(site + after for site in first for after in (1, 2))]
        self.register_buffer("weight_sites", torch.tensor(first), persistent=False)
        self.register_buffer("row_sites", torch.tensor(row_sites), persistent=False)

    def forward(self, x: Tensor, rows: Rows, dropout: Dropout | None = None) -> Tensor:
        """Item vectors [R, d] of right-aligned histories -> the states [R, d] after each; rows.length <= max_inputs."""
        return kernels.sequence_encoder(
            functools.partial(self._states, x, rows, dropout),
            x,
            self.weights(),
            kernels.SequenceGrid(rows.slots, rows.length),
            lambda: None if dropout is None else dropout.hashed(),
        )

    def _states(self, x: Tensor, rows: Rows, dropout: Dropout | None) -> Tensor:
        """The same by PyTorch: the specification."""
        positions = rows.slots % rows.length + self.max_inputs - rows.length
        x = self._placed(x, positions)
        at_input, *drops = self._drops(x, rows, positions, dropout)
        x = x * at_input
        hidden = self._hidden(rows)
        for block, drop in zip(self.blocks, drops):
            x = block(x, rows, hidden, drop)
        return x

    def last(self, x: Tensor, rows: Rows) -> Tensor:
        """The state after each user's whole history, [users, d], without dropout; every history holds an item."""
        grid = kernels.SequenceGrid(rows.slots, rows.length)
        return kernels.last_states(functools.partial(self._last, x, rows), x, self.weights(), grid)

    def _last(self, x: Tensor, rows: Rows) -> Tensor:
        """The same by PyTorch."""
        x, hidden = self._placed(x, rows.slots % rows.length + self.max_inputs - rows.length), self._hidden(rows)
        for block in self.blocks[:-1]:
            x = block(x, rows, hidden, NO_DROPS)
        return self.blocks[-1].last(x, rows, hidden)

    def weights(self) -> kernels.SequenceWeights:
        """All of them, as the op takes them."""
        tensors = [self.position, self.norm.weight, self.norm.bias]
        for block in self.blocks:
            tensors += [block.query.weight, block.key.weight, block.value.weight, block.output.weight]
            tensors += [block.attention_norm.weight, block.attention_norm.bias]
            tensors += [block.feed_in.weight, block.feed_in.bias, block.feed_out.weight, block.feed_out.bias]
            tensors += [block.feed_norm.weight, block.feed_norm.bias]
        return kernels.SequenceWeights(tensors, self.blocks[0].heads if self.blocks else 1, NORM_EPSILON)

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        # A product with one-hot rows: its gradient is a plain product too, where a lookup's would be a scatter.
        one_hot = positions[:, None] == torch.arange(self.max_inputs, device=x.device)
        return self.norm(x + one_hot.to(x.dtype) @ self.position)

    def _hidden(self, rows: Rows) -> Tensor:
        """bool [users, 1, L, L]: keys that are later or padding, but for its own: a softmax over nothing is NaN."""
        slots, length = rows.slots, rows.length
        empty = torch.ones(rows.users * length, dtype=torch.bool, device=slots.device).index_fill(0, slots, False)
        later = torch.ones(length, length, dtype=torch.bool, device=slots.device).triu(1)
        itself = torch.eye(length, dtype=torch.bool, device=slots.device)
        return ((later | empty.view(-1, 1, length)) & ~itself)[:, None]

    def _drops(self, x: Tensor, rows: Rows, positions: Tensor, dropout: Dropout | None) -> list:
        """Factors of the input, then of each block; ones where nothing drops."""
        if dropout is None or not dropout.masks.threshold:
            return [1.0] + [NO_DROPS] * len(self.blocks)
        by_row = dropout.masks.factors(
            self.row_sites,
            dropout.users[rows.slots // rows.length],
            positions,
            torch.arange(x.shape[1], device=x.device),
            x.dtype,
        )
        weights = self._weight_factors(rows, dropout, x.dtype)
        return [by_row[0], *map(_Drops, weights, by_row[1::2], by_row[2::2])]

    def _weight_factors(self, rows: Rows, dropout: Dropout, dtype: torch.dtype) -> Tensor:
        """Factors of the attention weights: [blocks, users, heads, L, L]."""
        users, length, heads = rows.users, rows.length, self.blocks[0].heads
        positions = torch.arange(self.max_inputs - length, self.max_inputs, device=dropout.users.device)
        channels = torch.cat([head * self.max_inputs + positions for head in range(heads)])
        numbers = dropout.users.repeat_interleave(length, output_size=users * length)
        factors = dropout.masks.factors(self.weight_sites, numbers, positions.repeat(users), channels, dtype)
        return factors.view(-1, users, length, heads, length).transpose(2, 3)

    def _initialise(self) -> None:
        nn.init.xavier_normal_(self.position)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class _Spread(torch.autograd.Function):
    """Rows to their slots. Slots differ, so neither direction adds anything up: both are copies, and repeat exactly."""

    @staticmethod
    def forward(ctx, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Slots to rows: the other way round."""

    @staticmethod
    def forward(ctx, grid: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.count = len(grid)
        return grid.index_select(0, slots)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, gradient.shape[1]).index_copy_(0, slots, gradient), None
