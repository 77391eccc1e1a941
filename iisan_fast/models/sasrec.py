"""Define SASRec, a small causal transformer over item vectors. The op `kernels.sequence_encoder` computes with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig

NORM_EPSILON = 1e-6


class Block(nn.Module):
    """The parameters of a post-norm transformer block: attention without biases, then a ReLU feed-forward of 4d."""

    def __init__(self, config: ModelConfig) -> None:
        """Make a block of width d = embedding_dim with `attention_heads` heads."""
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

    def weights(self) -> list[Tensor]:
        """Return all parameters in the order that the op takes them."""
        attention = [self.query.weight, self.key.weight, self.value.weight, self.output.weight]
        attention += [self.attention_norm.weight, self.attention_norm.bias]
        feed_forward = [self.feed_in.weight, self.feed_in.bias, self.feed_out.weight, self.feed_out.bias]
        return [*attention, *feed_forward, self.feed_norm.weight, self.feed_norm.bias]


class SASRec(nn.Module):
    """The sequence encoder (Kang and McAuley 2018), configured as in IISAN."""

    def __init__(self, config: ModelConfig, max_inputs: int) -> None:
        """Make a SASRec of `config.blocks` blocks for histories of at most `max_inputs` items."""
        super().__init__()
        self.max_inputs = max_inputs
        self.heads = config.attention_heads
        self.position = nn.Parameter(torch.empty(max_inputs, config.embedding_dim))
        self.norm = nn.LayerNorm(config.embedding_dim, eps=NORM_EPSILON)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self._initialise()

    def forward(self, x: Tensor, grid: kernels.SequenceGrid, dropout: kernels.SequenceDropout | None = None) -> Tensor:
        """Return the state [R, d] after each item of right-aligned histories.

        x: the item vectors [R, d] of all histories. grid: where each of the R rows is, by user and position. dropout:
        None for no dropout.
        """
        return kernels.sequence_encoder(x, self.weights(), grid, dropout)

    def last(self, x: Tensor, grid: kernels.SequenceGrid) -> Tensor:
        """Return each user's state after the whole history, [users, d], without dropout. No history may be empty.

        x, grid: as in `forward`.
        """
        return kernels.last_states(x, self.weights(), grid)

    def weights(self) -> kernels.SequenceWeights:
        """Return all parameters in the form that the op takes."""
        tensors = [self.position, self.norm.weight, self.norm.bias]
        for block in self.blocks:
            tensors += block.weights()
        return kernels.SequenceWeights(tensors, self.heads, NORM_EPSILON)

    def _initialise(self) -> None:
        """Draw the matrices and positions (Xavier normal), and set the biases to 0."""
        nn.init.xavier_normal_(self.position)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
