"""Define the trained vectors that are added to the vectors of items that occur in training."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels

ITEM_SITE = 1 << 20  # the dropout's site, far above the sites of the sequence encoder's blocks


def trained_rows(popularity: np.ndarray) -> Tensor:
    """Return the row of each item number in the trained vectors, int64 [items + 1]; 0 for an item without one.

    popularity: [items + 1], the share or the number of each item's training interactions.
    """
    trained = torch.from_numpy(popularity > 0)
    return trained.cumsum(0) * trained


class ItemIds(nn.Module):
    """A trained vector for each item that occurs in training, with dropout; exactly zero for all other items.

    The vectors begin at zero: training begins with the content vectors, as it does without them, and an item's vector
    moves away from its content as far as the item's interactions ask for. The gradients of two items differ, so equal
    beginnings do not keep them equal.
    """

    def __init__(self, popularity: np.ndarray, embedding_dim: int, dropout: float, seed: int) -> None:
        """Make the vectors.

        popularity: float64 [items + 1], each item's share of the training interactions. dropout: probability of a
        number to be dropped in a step. seed: of the dropout.
        """
        super().__init__()
        self.dropout = dropout
        self.seed = seed
        rows = trained_rows(popularity)
        self.register_buffer("rows", rows, persistent=False)
        self.weight = nn.Parameter(torch.zeros(int(rows.max()) + 1, embedding_dim))

    def forward(self, items: Tensor, step: int | Tensor | None) -> Tensor:
        """Return the vectors [N, d] of item numbers int64 [N]. step: of the dropout, as a batch has it; None for none.

        The mask of an item in a step hashes (seed, step, item, number) alone: it does not depend on the batch or its
        order. The gradient is deterministic, and zero in row 0.
        """
        vectors = F.embedding(self.rows[items], self.weight, padding_idx=0)
        factors = self.factors(items, step)
        return vectors if factors is None else vectors * factors

    def factors(self, items: Tensor, step: int | Tensor | None) -> Tensor | None:
        """Return the dropout's factors [N, d], 0 or 1 / (1 - probability), as `forward` takes them; None for none."""
        if step is None:
            return None
        dropout = kernels.sequence_dropout(self.dropout, self.seed, step, items)
        if dropout is None:
            return None
        width = self.weight.shape[1]
        site = torch.full((1,), ITEM_SITE, device=items.device)
        channels = torch.arange(width, device=items.device)
        return kernels.drop_factors(dropout, site, items, torch.zeros_like(items), channels, self.weight.dtype)[0]
