"""The training step as the released research code takes it, states in memory: what the fast path is measured against.

Every user fills all slots, every slot is encoded, padding too; a tower's three linear maps follow one another; the
loss loops over users; Adam is PyTorch's own. Only the kept layers are read. The mathematics, the parameters and the
dropout are those of the fast path, so both give one loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import StatelessDropout
from ..kernels.reference import side_tower
from ..recommender import Recommender
from ..sasrec import SITES_PER_BLOCK, Block
from ..sequences import Sequences


class DenseTrainer:
    """A recommender of IISAN's form, trained densely."""

    def __init__(
        self, model: Recommender, tables: list[Tensor], sequences: Sequences, rates: Mapping[str, float], seed: int
    ) -> None:
        """tables: two views' states of one shape, fp32 [items + 1, K, D], row 0 being padding; rates by group."""
        self.model, self.tables, self.sequences, self.seed = model, tables, sequences, seed
        self.log_popularity = torch.from_numpy(sequences.popularity).log().to(tables[0].device)
        groups = model.parameter_groups()
        self.optimizer = torch.optim.Adam([{"params": groups[name], "lr": rate} for name, rate in rates.items()])

    def step(self, users: np.ndarray, step: int) -> Tensor:
        """One optimizer step on the users int64 [B]; returns the loss before it, a scalar."""
        self.optimizer.zero_grad()
        loss = self.loss(users, step)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, users: np.ndarray, step: int) -> Tensor:
        """The paper's loss over all slots, a user at a time."""
        slots = torch.from_numpy(self.slots(users)).to(self.tables[0].device)  # [B, max_inputs + 1]
        vectors = self.item_vectors(slots.flatten()).unflatten(0, slots.shape)
        states = self.sequence_states(vectors[:, :-1], slots[:, :-1] > 0, torch.from_numpy(users), step)
        return self.in_batch_loss(slots, vectors, states)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Item numbers int64 [N] -> [N, d]: gathered states, towers, and their linear maps one after the other."""
        side, heads = self.model.side_network, self.model.heads
        first, second = (table[items] for table in self.tables)
        activation = side.activation
        outputs = {
            "first": side_tower(first, None, *side.first.reading(0)[1:], activation),
            "second": side_tower(second, None, *side.second.reading(1)[1:], activation),
            "inter": side_tower(first, second, *side.inter.reading(0, 1)[1:], activation),
        }
        return heads.fusion(torch.cat([getattr(heads, name)(outputs[name]) for name in heads.towers], dim=1))

    def sequence_states(self, x: Tensor, real: Tensor, users: Tensor, step: int) -> Tensor:
        """SASRec over all slots, padding included: [B, L, d] -> [B, L, d]; real bool [B, L]."""
        encoder, (batch, length, d) = self.model.sequence_encoder, x.shape
        masks = StatelessDropout(self.model.config.dropout, self.seed, step)
        numbers = users.to(x.device).repeat_interleave(length)
        positions = torch.arange(length, device=x.device)

        def drop(value: Tensor, site: int, channels: int) -> Tensor:
            where = torch.tensor([site], device=x.device), numbers, positions.repeat(batch)
            factors = masks.factors(*where, torch.arange(channels, device=x.device), value.dtype)
            return value * factors.view(batch, length, channels)

        def attend(block: Block, x: Tensor, site: int) -> Tensor:
            q, k, v = (
                linear(x).view(batch, length, block.heads, -1).transpose(1, 2)
                for linear in (block.query, block.key, block.value)
            )
            scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf"))
            by_query = scores.softmax(dim=-1).transpose(1, 2).reshape(batch, length, -1)
            weights = drop(by_query, site, block.heads * length).view(batch, length, block.heads, length)
            return block.output((weights.transpose(1, 2) @ v).transpose(1, 2).reshape(batch, length, d))

        causal = positions[:, None] >= positions
        itself = positions[:, None] == positions
        visible = (causal & real[:, None, :] | itself)[:, None]
        x = drop(encoder.norm(x * real[..., None] + encoder.position), 0, d)
        for i, block in enumerate(encoder.blocks):
            site = 1 + SITES_PER_BLOCK * i
            x = block.attention_norm(x + drop(attend(block, x, site), site + 1, d))
            x = block.feed_norm(x + drop(block.feed_out(F.relu(block.feed_in(x))), site + 2, d))
        return x

    def in_batch_loss(self, slots: Tensor, vectors: Tensor, states: Tensor) -> Tensor:
        """slots [B, L + 1] item numbers, 0 for padding; vectors [B, L + 1, d]; states [B, L, d]."""
        flat = slots.flatten()
        columns = flat.nonzero()[:, 0]
        items, candidates = flat[columns], vectors.flatten(0, 1)[columns]
        correction = self.log_popularity[items].to(vectors.dtype)
        column_of_slot = torch.full_like(flat, -1)
        column_of_slot[columns] = torch.arange(len(columns), device=flat.device)
        total, rows = states.new_zeros(()), 0
        for user, row in enumerate(slots):
            positions = (row[:-1] > 0).nonzero()[:, 0]
            targets = column_of_slot.view_as(slots)[user, positions + 1]
            logits = states[user, positions] @ candidates.T - correction
            own = torch.isin(items, row)[None].repeat(len(positions), 1)
            own[torch.arange(len(positions)), targets] = False
            total = total + F.cross_entropy(logits.masked_fill(own, float("-inf")), targets, reduction="sum")
            rows += len(positions)
        return total / rows

    def slots(self, users: np.ndarray) -> np.ndarray:
        """int64 [B, max_inputs + 1]: training sequences at the right end of their slots."""
        offsets, items = self.sequences.training
        slots = np.zeros((len(users), self.sequences.max_inputs + 1), dtype=np.int64)
        for row, user in zip(slots, users):
            history = items[offsets[user] : offsets[user + 1]]
            row[len(row) - len(history) :] = history
        return slots
