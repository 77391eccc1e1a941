"""The baselines' plain parts: heads on final states, and the item encoders that run no pretrained encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import States


class FinalHeads(nn.Module):
    """GELU(Linear(D, d)) of each view's final state, their concatenation, Linear(views * d, d) (IISAN's baselines)."""

    def __init__(self, widths: list[int], embedding_dim: int) -> None:
        super().__init__()
        self.views = nn.ModuleList(nn.Sequential(nn.Linear(width, embedding_dim), nn.GELU()) for width in widths)
        self.fusion = nn.Linear(len(widths) * embedding_dim, embedding_dim)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Each view's states, [N, D] in any floating dtype -> [N, d]."""
        dtype = self.fusion.weight.dtype
        heads = [head(state.to(dtype)) for head, state in zip(self.views, states)]
        return self.fusion(torch.cat(heads, dim=1))


class FrozenItemEncoder(nn.Module):
    """Item vectors from hidden states: heads on the last kept layer of each view."""

    small_operators = True  # a CPU's threads cost them more than they give

    def __init__(self, widths: list[int], embedding_dim: int) -> None:
        super().__init__()
        self.heads = FinalHeads(widths, embedding_dim)

    def forward(self, states: list[States]) -> Tensor:
        """[N, d] for the hidden states of N items."""
        final = [view.table[:, -1] for view in states]
        return self.heads(
            [table if view.rows is None else table.index_select(0, view.rows) for table, view in zip(final, states)]
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter under the name of its learning rate, once."""
        return {"heads": list(self.heads.parameters())}


class IdItemEncoder(nn.Module):
    """Item vectors of their own, by item number: SASRec as it was proposed."""

    small_operators = True

    def __init__(self, items: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(items + 1, embedding_dim)  # of the padding too, which nothing reads
        nn.init.xavier_normal_(self.embedding.weight)

    def forward(self, states: list[States]) -> Tensor:
        """[N, d] for N items, whose one feature, int64 [M, 1, 1], is their number. Its gradient repeats exactly: equal
        numbers' are added up in order."""
        ((numbers, rows),) = states
        return self.embedding(numbers.flatten() if rows is None else numbers.flatten().index_select(0, rows))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter under the name of its learning rate, once."""
        return {"item_embeddings": [self.embedding.weight]}
