"""The recommender: item vectors from hidden states, user states from item vectors, one loss and one score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from . import kernels
from .batches import Batch
from .config import ModelConfig, RunConfig
from .dropout import StatelessDropout
from .feature_table import Table
from .kernels import States
from .sasrec import Dropout, Rows, SASRec
from .side_network import Heads, SideNetwork, SideTower, ViewShape

ITEMS_AT_ONCE = 8192
USERS_AT_ONCE = 512
USER_WORKERS = 2  # on a CPU


class Recommender(nn.Module):
    """IISAN or IISAN-Versa over a feature table, with SASRec on top."""

    def __init__(
        self, views: list[ViewShape], config: ModelConfig, max_inputs: int, popularity: np.ndarray, seed: int
    ) -> None:
        """views: (K, D) of each view; popularity float64 [items + 1]; seed draws the weights and the dropout."""
        super().__init__()
        self.config, self.seed = config, seed
        self.operands: torch.dtype | None = None  # of the side network's products on a CPU; None: the weights' dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.side_network = SideNetwork(views, config)
            self.heads = Heads(self.side_network.output_widths, config)
            self.sequence_encoder = SASRec(config, max_inputs)
        log_popularity = torch.from_numpy(popularity).log()
        log_popularity[0] = 0  # padding has none, and minus infinity would meet that of its multiplicity
        self.register_buffer("log_popularity", log_popularity, persistent=False)

    def loss(self, batch: Batch, states: list[States]) -> Tensor:
        """Mean debiased in-batch cross-entropy over the batch's rows (IISAN, equation 5); states of batch.distinct."""
        vectors = self.item_vectors(states)
        rows = Rows(batch.row_slots, len(batch.users), batch.length)
        losses = kernels.inbatch_cross_entropy(
            queries=self.sequence_encoder(vectors[batch.inputs], rows, self._dropout(batch)),
            items=vectors,
            targets=batch.targets,
            row_users=batch.row_users,
            history_bits=batch.history_bits,
            log_multiplicity=batch.multiplicity.to(vectors.dtype).log(),
            log_popularity=self.log_popularity[batch.distinct].to(vectors.dtype),
            reduction="none",
        )
        return losses @ batch.weights.to(losses.dtype)

    def item_vectors(self, states: list[States]) -> Tensor:
        """[N, d] for the hidden states of N items."""
        projections, bias = self.heads.folded()
        return self.side_network(states, projections, self.operands) + bias

    @torch.inference_mode()
    def catalogue_vectors(self, table: Table) -> Tensor:
        """[items, d]: every item's vector, item number i in row i - 1."""
        numbers = torch.arange(1, table.rows, device=table.index_device)
        # Equal parts: a last part of one item would take another matrix product and no longer tie with its equals.
        parts = numbers.tensor_split(-(-len(numbers) // ITEMS_AT_ONCE))
        return torch.cat([self.item_vectors(table.states(part)) for part in parts])

    @torch.inference_mode()
    def user_states(self, vectors: Tensor, inputs: np.ndarray) -> Tensor:
        """[users, d] after each user's inputs (int64 [users, max_inputs], right-aligned, 0 for padding)."""

        def some(part: np.ndarray) -> Tensor:
            slots = np.flatnonzero(part)
            rows = Rows(torch.from_numpy(slots).to(vectors.device), len(part), part.shape[1])
            return self.sequence_encoder.last(vectors[torch.from_numpy(part.flat[slots] - 1).to(vectors.device)], rows)

        parts = [inputs[start : start + USERS_AT_ONCE] for start in range(0, len(inputs), USERS_AT_ONCE)]
        return torch.cat(kernels.at_once(some, parts, USER_WORKERS if vectors.is_cpu else 1))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter under the name of its learning rate, once."""
        towers = [module for module in self.side_network.modules() if isinstance(module, SideTower)]
        gates = [tower.gate for tower in towers if tower.gate is not None]
        adapters = [parameter for tower in towers for parameter in tower.parameters() if parameter is not tower.gate]
        align = [parameter for name, parameter in self.side_network.named_parameters() if name.startswith("align_")]
        groups = {
            "adapters": adapters,
            "gates": gates,
            "heads": [*align, *self.heads.parameters()],
            "sequence_encoder": list(self.sequence_encoder.parameters()),
        }
        grouped = [id(parameter) for group in groups.values() for parameter in group]
        assert sorted(grouped) == sorted(id(parameter) for parameter in self.parameters() if parameter.requires_grad)
        return groups

    def _dropout(self, batch: Batch) -> Dropout | None:
        if not self.training:
            return None
        return Dropout(StatelessDropout(self.config.dropout, self.seed, batch.step), batch.users)


def build_recommender(views: list[ViewShape], config: RunConfig, popularity: np.ndarray) -> Recommender:
    """The recommender of a run's configuration."""
    return Recommender(views, config.model, config.protocol.max_inputs, popularity, config.train.seed)
