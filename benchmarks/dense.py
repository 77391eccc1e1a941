"""The model and its training step as the released research code computes them: the dense reference.

Every user fills all slots, and every slot is encoded, padding too. A tower's three linear maps follow one another. The
loss loops over users and positions; Adam is PyTorch's. States are in memory, only the kept layers are read. Parameters
and dropout are those of the fast path, so both give the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..data import Sequences
from ..kernels import SITES_PER_BLOCK, States
from ..models import Block, Recommender

Drop = Callable[[Tensor, int], Tensor]  # of a value [B, L, channels] and its site


def keep_all(value: Tensor, site: int) -> Tensor:
    """Return the value without dropout."""
    return value


class DenseModel:
    """A recommender of IISAN's form, computed densely."""

    def __init__(self, model: Recommender, tables: list[Tensor]) -> None:
        """Take a model's parameters.

        tables: two views' states of one shape, [items + 1, K, D]; row 0 is padding.
        """
        self.model = model
        self.tables = tables

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return the vectors [N, d] of item numbers int64 [N]."""
        side = self.model.item_encoder.side_network
        heads = self.model.item_encoder.heads
        first, second = (table[items] for table in self.tables)
        read = {
            "first": ([States(first)], side.first.reading(0)),
            "second": ([States(second)], side.second.reading(0)),
            "inter": ([States(first), States(second)], side.inter.reading(0, 1)),
        }
        outputs = {
            name: kernels.side_towers(states, [tower], side.activation, form="reference")[0]
            for name, (states, tower) in read.items()
        }
        return heads.fusion(torch.cat([getattr(heads, name)(outputs[name]) for name in heads.towers], dim=1))

    def sequence_states(self, x: Tensor, real: Tensor, drop: Drop = keep_all) -> Tensor:
        """Return SASRec's states [B, L, d] over all slots, padding included.

        x: [B, L, d] item vectors; real: bool [B, L], False for padding.
        """
        encoder = self.model.sequence_encoder
        (batch, length, d) = x.shape
        positions = torch.arange(length, device=x.device)

        def attend(block: Block, x: Tensor, site: int) -> Tensor:
            q, k, v = (
                linear(x).view(batch, length, block.heads, -1).transpose(1, 2)
                for linear in (block.query, block.key, block.value)
            )
            scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf"))
            by_query = scores.softmax(dim=-1).transpose(1, 2).reshape(batch, length, -1)
            weights = drop(by_query, site).view(batch, length, block.heads, length)
            return block.output((weights.transpose(1, 2) @ v).transpose(1, 2).reshape(batch, length, d))

        causal = positions[:, None] >= positions
        itself = positions[:, None] == positions
        visible = (causal & real[:, None, :] | itself)[:, None]
        x = drop(encoder.norm(x * real[..., None] + encoder.position), 0)
        for i, block in enumerate(encoder.blocks):
            site = 1 + SITES_PER_BLOCK * i
            x = block.attention_norm(x + drop(attend(block, x, site), site + 1))
            x = block.feed_norm(x + drop(block.feed_out(F.relu(block.feed_in(x))), site + 2))
        return x


class DenseTrainer(DenseModel):
    """A dense model that is trained."""

    def __init__(
        self, model: Recommender, tables: list[Tensor], sequences: Sequences, rates: Mapping[str, float], seed: int
    ) -> None:
        """Take a model's parameters and make an Adam optimizer.

        tables: as DenseModel takes them, in the weights' dtype; rates: learning rates by parameter group.
        """
        super().__init__(model, tables)
        self.sequences = sequences
        self.seed = seed
        self.log_popularity = torch.from_numpy(sequences.popularity).log().to(tables[0].device)
        groups = model.parameter_groups()
        self.optimizer = torch.optim.Adam([{"params": groups[name], "lr": rate} for name, rate in rates.items()])

    def step(self, users: np.ndarray, step: int) -> Tensor:
        """Take one optimizer step on the users int64 [B] and return the loss before it, a scalar."""
        self.optimizer.zero_grad()
        loss = self.loss(users, step)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, users: np.ndarray, step: int) -> Tensor:
        """Return the paper's loss of the users int64 [B] over all slots, computed a row at a time."""
        slots = torch.from_numpy(self.slots(users)).to(self.tables[0].device)  # [B, max_inputs + 1]
        vectors = self.item_vectors(slots.flatten()).unflatten(0, slots.shape)
        states = self.sequence_states(vectors[:, :-1], slots[:, :-1] > 0, self.dropout(users, step))
        return self.in_batch_loss(slots, vectors, states)

    def dropout(self, users: np.ndarray, step: int) -> Drop:
        """Return the function that applies a step's dropout masks to the slots of the users int64 [B]."""
        numbers = torch.from_numpy(users).to(self.tables[0].device)
        masks = kernels.sequence_dropout(self.model.config.dropout, self.seed, step, numbers)
        if masks is None:
            return keep_all

        def drop(value: Tensor, site: int) -> Tensor:
            batch, length, channels = value.shape
            factors = kernels.drop_factors(
                masks,
                torch.tensor([site], device=value.device),
                numbers.repeat_interleave(length),
                torch.arange(length, device=value.device).repeat(batch),
                torch.arange(channels, device=value.device),
                value.dtype,
            )
            return value * factors.view_as(value)

        return drop

    def in_batch_loss(self, slots: Tensor, vectors: Tensor, states: Tensor) -> Tensor:
        """Return the mean loss.

        slots: item numbers [B, L + 1], 0 for padding; vectors: [B, L + 1, d]; states: [B, L, d].
        """
        flat = slots.flatten()
        columns = flat.nonzero()[:, 0]
        items, candidates = flat[columns], vectors.flatten(0, 1)[columns]
        correction = self.log_popularity[items].to(vectors.dtype)
        column_of_slot = torch.full_like(flat, -1)
        column_of_slot[columns] = torch.arange(len(columns), device=flat.device)
        losses = []
        for user, row in enumerate(slots):
            in_history = torch.isin(items, row)
            for position in (row[:-1] > 0).nonzero()[:, 0].tolist():
                target = column_of_slot[user * slots.shape[1] + position + 1]
                logits = candidates @ states[user, position] - correction
                masked = in_history.clone()
                masked[target] = False
                losses.append(F.cross_entropy(logits.masked_fill(masked, float("-inf")), target))
        return torch.stack(losses).mean()

    def slots(self, users: np.ndarray) -> np.ndarray:
        """Return the training sequences of the users, right-aligned: int64 [B, max_inputs + 1], 0 for padding."""
        offsets, items = self.sequences.training
        slots = np.zeros((len(users), self.sequences.max_inputs + 1), dtype=np.int64)
        for row, user in zip(slots, users):
            history = items[offsets[user] : offsets[user + 1]]
            row[len(row) - len(history) :] = history
        return slots
