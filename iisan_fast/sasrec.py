"""SASRec: a small causal transformer over item vectors, whose dropout depends on who and where, not on batching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig

MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B1
SITES_PER_BLOCK = 3


class StatelessDropout:
    """Dropout whose every mask bit is a hash of (seed, step, site, user, position, channel).

    Padded, jagged, resumed and multi-rank runs therefore draw the same masks.
    """

    def __init__(self, probability: float, seed: int, step: int, users: Tensor, positions: Tensor) -> None:
        """users int64 [B]; positions int64 [L], slots of the right-aligned history, 0..max_inputs-1."""
        self.threshold = round(probability * 2**32)
        self.scale = 1 / (1 - probability)
        self.prefix = _absorb(_mix(seed & MASK32), step)
        self.users, self.positions = users, positions

    def __call__(self, x: Tensor, site: int, channels: Tensor | None = None) -> Tensor:
        """x [B, L, C]: drops by channel number, 0..C-1 unless channels int64 [C] gives others."""
        if not self.threshold:
            return x
        if channels is None:
            channels = torch.arange(x.shape[-1], device=x.device)
        user = _absorb(torch.full_like(self.users, _absorb(self.prefix, site)), self.users)
        position = _absorb(user[:, None], self.positions)
        keep = _absorb(position[..., None], channels) >= self.threshold
        return x * keep * self.scale


class Block(nn.Module):
    """A post-norm transformer block: attention without biases, then a ReLU feed-forward of 4d."""

    def __init__(self, config: ModelConfig, max_inputs: int, first_site: int) -> None:
        super().__init__()
        d = config.embedding_dim
        self.heads, self.max_inputs, self.first_site = config.attention_heads, max_inputs, first_site
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.attention_norm = nn.LayerNorm(d, eps=1e-6)
        self.feed_in = nn.Linear(d, 4 * d)
        self.feed_out = nn.Linear(4 * d, d)
        self.feed_norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, x: Tensor, visible: Tensor, dropout: StatelessDropout | None) -> Tensor:
        """x [B, L, d]; visible bool [B, 1, L, L]: which key each query may attend to."""
        drop = dropout or (lambda value, site, channels=None: value)
        attended = self.output(self._attend(x, visible, drop))
        x = self.attention_norm(x + drop(attended, self.first_site + 1))
        fed = self.feed_out(F.relu(self.feed_in(x)))
        return self.feed_norm(x + drop(fed, self.first_site + 2))

    def _attend(self, x: Tensor, visible: Tensor, drop) -> Tensor:
        batch, length, d = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)  # [B, heads, L, L]
        slots = torch.arange(self.max_inputs - length, self.max_inputs, device=x.device)
        channels = torch.cat([head * self.max_inputs + slots for head in range(self.heads)])
        by_query = weights.transpose(1, 2).reshape(batch, length, self.heads * length)
        by_query = drop(by_query, self.first_site, channels)
        weights = by_query.view(batch, length, self.heads, length).transpose(1, 2)
        return (weights @ v).transpose(1, 2).reshape(batch, length, d)


class SASRec(nn.Module):
    """The sequence encoder (Kang and McAuley 2018, as IISAN configures it)."""

    def __init__(self, config: ModelConfig, max_inputs: int) -> None:
        super().__init__()
        self.max_inputs = max_inputs
        self.position = nn.Parameter(torch.empty(max_inputs, config.embedding_dim))
        self.norm = nn.LayerNorm(config.embedding_dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(config, max_inputs, 1 + SITES_PER_BLOCK * i) for i in range(config.blocks))
        self._initialise()

    def forward(self, x: Tensor, real: Tensor, dropout: StatelessDropout | None = None) -> Tensor:
        """Item vectors [B, L, d], right-aligned, L <= max_inputs, with real bool [B, L] -> states [B, L, d].

        States at padding are finite and mean nothing.
        """
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=x.device)
        visible = (causal & real[:, None, :] | itself)[:, None]  # padding sees itself: a softmax over nothing is NaN
        x = self.norm(x + self.position[self.max_inputs - length :])
        if dropout is not None:
            x = dropout(x, 0)
        for block in self.blocks:
            x = block(x, visible, dropout)
        return x

    def _initialise(self) -> None:
        nn.init.xavier_normal_(self.position)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _mix(h):
    """A 32-bit finaliser (xor-shift, multiply) of an int or an int64 tensor holding unsigned 32-bit values."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & MASK32
    h = (h ^ (h >> 15)) * 0x846CA68B & MASK32
    return h ^ (h >> 16)


def _absorb(h, field):
    return _mix(h ^ (field * GOLDEN & MASK32))
