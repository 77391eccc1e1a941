"""Define the recommender: item vectors from an item encoder, user states from item vectors, a loss and scores."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels
from ..config import SIDE_METHODS, ModelConfig, RunConfig
from ..data import Batch
from ..precision import Precision
from ..ranks import ALONE, Ranks, gathered
from ..states import ItemInputs, ItemSource
from .item_encoders import FrozenItemEncoder, IdItemEncoder
from .item_ids import ItemIds
from .losses import BinaryLoss
from .sasrec import SASRec
from .side_network import SideItemEncoder

ITEM_PARAMETERS = ("item_encoder.", "item_ids.")  # starts of the names of parameters that give item vectors
LEAST_ITEMS = 16  # that a rank encodes for the catalogue, if there are so many
USERS_AT_ONCE = 512  # users whose states are computed at a time
USER_WORKERS = 2  # threads that compute user states on a CPU


class Recommender(nn.Module):
    """An item encoder, and SASRec over the item vectors that it gives."""

    def __init__(
        self,
        make_item_encoder: Callable[[], nn.Module],
        config: ModelConfig,
        max_inputs: int,
        popularity: np.ndarray,
        seed: int,
        item_ids: ItemIds | None = None,
        binary_loss: BinaryLoss | None = None,
    ) -> None:
        """Make the recommender with random weights.

        make_item_encoder: makes a module that maps the inputs of N items, as an item source reads them, to [N, d], and
        that has `parameter_groups`. It is called here, because `seed` draws all weights; `seed` also draws the dropout.
        max_inputs: the most items of a history. popularity: float64 [items + 1], each item's share of the training
        interactions; entry 0 is padding. item_ids: vectors to add to those of the item encoder; None adds none.
        binary_loss: the loss in place of the cross-entropy.
        """
        super().__init__()
        self.config = config
        self.seed = seed
        self.binary_loss = binary_loss
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # encoders may be on a GPU already
            torch.manual_seed(seed)
            self.item_encoder = make_item_encoder()
            self.sequence_encoder = SASRec(config, max_inputs)
        self.item_ids = item_ids
        log_popularity = torch.from_numpy(popularity).log()
        log_popularity[0] = 0  # padding: log(0) would give NaN with the log of its multiplicity
        self.register_buffer("log_popularity", log_popularity, persistent=False)

    def loss(self, batch: Batch, inputs: ItemInputs, ranks: Ranks = ALONE) -> Tensor:
        """Return the loss of a batch, or of a rank's share of it, a scalar weighted by the batch's row weights.

        It is the cross-entropy over the batch's columns (IISAN, equation 5, if these are its own items), whose formula
        is in `kernels.inbatch_cross_entropy`, or the model's binary loss. inputs: of the items batch.encoded, as an
        item source reads them.
        """
        vectors = self._item_vectors(inputs, batch.encoded, batch.step if self.training else None)
        vectors = gathered(vectors, len(batch.distinct), ranks)
        grid = kernels.SequenceGrid(batch.row_slots, len(batch.users), batch.length)
        queries = self.sequence_encoder(vectors[batch.inputs], grid, self._dropout(batch))
        losses = self._row_losses(batch, queries, vectors)
        return losses @ batch.weights.to(losses.dtype)

    def _row_losses(self, batch: Batch, queries: Tensor, vectors: Tensor) -> Tensor:
        """Return the loss of each row [R]. queries: [R, d]. vectors: [V, d], of the items batch.distinct."""
        of_rows = queries, vectors, batch.targets, batch.row_users, batch.history_bits
        if self.binary_loss is not None:
            negatives, power = self.binary_loss
            return kernels.generalised_binary_cross_entropy(*of_rows, batch.multiplicity, power, negatives)
        return kernels.inbatch_cross_entropy(
            *of_rows,
            log_multiplicity=batch.multiplicity.to(vectors.dtype).log(),
            log_popularity=self.log_popularity[batch.distinct].to(vectors.dtype),
            reduction="none",
        )

    def step_operands(self, batch: Batch, inputs: list[kernels.States]) -> kernels.RecommenderBatch:
        """Return a batch, with the hidden states of the items batch.encoded, in the form that a fused step takes."""
        return kernels.RecommenderBatch(
            states=inputs,
            distinct=batch.distinct,
            multiplicity=batch.multiplicity,
            inputs=batch.inputs,
            targets=batch.targets,
            row_users=batch.row_users,
            history_bits=batch.history_bits,
            row_weights=batch.weights,
            step=int(batch.step),
            log_popularity=self.log_popularity.double(),
            grid=kernels.SequenceGrid(batch.row_slots, len(batch.users), batch.length),
            dropout=self._dropout(batch),
            block=batch.block,
        )

    def step_weights(self) -> kernels.RecommenderWeights:
        """Return all trained weights in the roles that a fused step has for them.

        Raises ValueError if a fused step cannot train this model; `step_refusal` says why.
        """
        if reason := self.step_refusal():
            raise ValueError(f"model: expected one for a fused step, found that {reason}")
        return self.item_encoder.weights(self.sequence_encoder.weights())

    def step_refusal(self) -> str:
        """Return why a fused step cannot train this model, in one phrase; "" if it can."""
        if not isinstance(self.item_encoder, SideItemEncoder):
            return "its item encoder is no side network"
        if self.item_ids is not None:
            return "it adds trained vectors to those of its item encoder"
        if self.binary_loss is not None:
            return "the loss gbce has no fused step"
        if frozen := next((name for name, weight in self.named_parameters() if not weight.requires_grad), ""):
            return f"{frozen} is not trained"
        return self.item_encoder.step_refusal()

    @torch.inference_mode()
    def item_vectors(self, source: ItemSource, items: Tensor) -> Tensor:
        """Return the vectors [N, d] of items, without gradients, in the mode (training or evaluation) of the model.

        The vectors that item_ids adds have no dropout. items: item numbers int64 [N] on the source's index device;
        padding, number 0, stands last.
        """
        return self._item_vectors(source.read(items), items, None)

    @torch.inference_mode()
    def encoded(self, inputs: ItemInputs, numbers: Tensor) -> Tensor:
        """Return the vectors [N, d] of N items from their inputs, without gradients.

        numbers: int64 [N], of the items that were trained, whose vectors of `item_ids` are added; 0 for new items.
        """
        return self._item_vectors(inputs, numbers, None)

    def catalogue_vectors(self, source: ItemSource, ranks: Ranks = ALONE) -> Tensor:
        """Return the vectors of all items, [items, d], item number i in row i - 1.

        Each rank encodes a block of the items, and gets all vectors. All ranks read the source equally often, as many
        items each time; beyond the last item they read that one.
        """
        items = source.rows - 1
        first = ranks.rank * ranks.block_size(items) + 1
        # In equal parts: a part of a few items takes another matrix product, so equal items would get unequal vectors.
        count = max(ranks.block_size(items), min(LEAST_ITEMS, items))
        numbers = torch.arange(first, first + count, device=source.index_device).clamp_(max=items)
        parts = numbers.tensor_split(-(-count // source.items_at_once))
        return ranks.gather_blocks(torch.cat([self.item_vectors(source, part) for part in parts]), items)

    @torch.inference_mode()
    def user_states(self, vectors: Tensor, inputs: np.ndarray) -> Tensor:
        """Return each user's state after the last input, [users, d], without dropout.

        vectors: [items, d] of the catalogue. inputs: item numbers, int64 [users, max_inputs], right-aligned, 0 for
        padding.
        """

        def states_after(part: np.ndarray) -> Tensor:
            slots = np.flatnonzero(part)
            grid = kernels.SequenceGrid(torch.from_numpy(slots).to(vectors.device), len(part), part.shape[1])
            return self.sequence_encoder.last(vectors[torch.from_numpy(part.flat[slots] - 1).to(vectors.device)], grid)

        if not len(inputs):
            return vectors.new_empty(0, self.config.embedding_dim)
        parts = [inputs[start : start + USERS_AT_ONCE] for start in range(0, len(inputs), USERS_AT_ONCE)]
        return torch.cat(kernels.at_once(states_after, parts, USER_WORKERS if vectors.is_cpu else 1))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by the name of their learning rate, each parameter once."""
        groups = {
            **self.item_encoder.parameter_groups(),
            "sequence_encoder": list(self.sequence_encoder.parameters()),
        }
        if self.item_ids is not None:
            groups["item_embeddings"] = list(self.item_ids.parameters())
        grouped = [id(parameter) for group in groups.values() for parameter in group]
        assert sorted(grouped) == sorted(id(parameter) for parameter in self.parameters() if parameter.requires_grad)
        return groups

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay shrinks: matrices, and tables of vectors such as those of item ids.

        Biases, gates, and the weights of norms stay as they are. Those have one axis, except the biases that a side
        network stacks by layer.
        """
        decayed = []
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter.dim() > 1 and not name.endswith("bias"):
                    decayed.append(parameter)
        return decayed

    def _item_vectors(self, inputs: ItemInputs, items: Tensor, step: int | Tensor | None) -> Tensor:
        """Return the vectors [N, d] of items: those of the item encoder, and those of `item_ids` if there are any.

        inputs: of the items. items: their numbers, int64 [N]. step: of the dropout of `item_ids`; None for none.
        """
        vectors = self.item_encoder(inputs)
        return vectors if self.item_ids is None else vectors + self.item_ids(items.to(vectors.device), step)

    def _dropout(self, batch: Batch) -> kernels.SequenceDropout | None:
        """Return the dropout of a batch in training mode; None in evaluation mode."""
        if not self.training:
            return None
        return kernels.sequence_dropout(self.config.dropout, self.seed, batch.step, batch.users)


def build_recommender(
    source: ItemSource, config: RunConfig, popularity: np.ndarray, precision: Precision
) -> Recommender:
    """Build the recommender for a run's configuration and the items of a source.

    popularity: float64 [items + 1], as `Recommender` takes it. precision: from `resolve_precision`.
    """
    model = config.model
    seed = config.train.seed
    item_ids = ItemIds(popularity, model.embedding_dim, model.item_id_dropout, seed) if model.item_ids else None
    binary_loss = BinaryLoss.of(config.train, popularity)
    if not config.train.debiased:
        popularity = np.ones_like(popularity)  # whose logarithm is 0
    make = functools.partial(make_item_encoder, source, config, precision)
    return Recommender(make, model, config.protocol.max_inputs, popularity, seed, item_ids, binary_loss)


def make_item_encoder(source: ItemSource, config: RunConfig, precision: Precision) -> nn.Module:
    """Build the item encoder of the configured method for the items of a source."""
    model = config.model
    if model.method in SIDE_METHODS:
        return SideItemEncoder(source.shapes, model)
    if model.method == "id":
        return IdItemEncoder(source.rows - 1, model.embedding_dim)
    if model.method == "frozen":
        return FrozenItemEncoder([width for _, width in source.shapes], model.embedding_dim)
    from .tuned_encoder import TunedItemEncoder  # imports transformers, which takes seconds

    return TunedItemEncoder(
        source.backbones,
        model.method,
        model.embedding_dim,
        model.bottleneck,
        model.activation,
        config.uncached.checkpointing,
        precision.products,
    )
