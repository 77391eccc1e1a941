"""Define the heads on final states, and the item encoders that run no pretrained encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import States


class FinalHeads(nn.Module):
    """The heads of IISAN's baselines: GELU(Linear(D, d)) of each view's final state, then Linear(views * d, d).

    The outputs of the views are concatenated between the two.
    """

    def __init__(self, widths: list[int], embedding_dim: int) -> None:
        """Make the heads. widths: the width D of each view; embedding_dim: d."""
        super().__init__()
        self.views = nn.ModuleList(nn.Sequential(nn.Linear(width, embedding_dim), nn.GELU()) for width in widths)
        self.fusion = nn.Linear(len(widths) * embedding_dim, embedding_dim)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Map the final state [N, D] of each view, in any floating dtype, to item vectors [N, d]."""
        dtype = self.fusion.weight.dtype
        heads = [head(state.to(dtype)) for head, state in zip(self.views, states)]
        return self.fusion(torch.cat(heads, dim=1))


class FrozenItemEncoder(nn.Module):
    """Item vectors from stored hidden states: heads on the last selected layer of each view."""

    small_operators = True  # too small to gain from several threads of a CPU

    def __init__(self, widths: list[int], embedding_dim: int) -> None:
        """Make the heads. widths: the width D of each view; embedding_dim: d."""
        super().__init__()
        self.heads = FinalHeads(widths, embedding_dim)

    def forward(self, states: list[States]) -> Tensor:
        """Return the item vectors [N, d] for the hidden states of N items."""
        return self.heads(final_states(states))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by the name of their learning rate, each parameter once."""
        return {"heads": list(self.heads.parameters())}


class IdItemEncoder(nn.Module):
    """One trained vector for each item number, as SASRec was proposed."""

    small_operators = True

    def __init__(self, items: int, embedding_dim: int) -> None:
        """Draw a vector [embedding_dim] for each of `items` items, and one for padding."""
        super().__init__()
        self.embedding = nn.Embedding(items + 1, embedding_dim)  # row 0 is padding, which nothing reads
        nn.init.xavier_normal_(self.embedding.weight)

    def forward(self, states: list[States]) -> Tensor:
        """Return the item vectors [N, d] of N items. states: one view, int64 [M, 1, 1], that holds the item numbers.

        The gradient is deterministic: the contributions of equal numbers are added in order.
        """
        ((numbers, rows),) = states
        return self.embedding(numbers.flatten() if rows is None else numbers.flatten().index_select(0, rows))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by the name of their learning rate, each parameter once."""
        return {"item_embeddings": [self.embedding.weight]}


def final_states(states: list[States]) -> list[Tensor]:
    """Return the last selected layer of each view for N items, [N, D], in the dtype of the view."""
    final = [view.table[:, -1] for view in states]
    return [table if view.rows is None else table.index_select(0, view.rows) for table, view in zip(final, states)]
