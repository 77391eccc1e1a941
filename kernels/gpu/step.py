"""The training step of a side-network recommender on a GPU: the ops in Triton, with the memory for all steps of a run.

Grids and buffers have the sizes of a `StepShape`. Kernels read a batch's true sizes from its header, so that the step
can be captured once in a CUDA graph. Where several ranks train together, the towers encode this rank's items, and the
other ops read the item vectors of all ranks, which are exchanged between the ops; see `shared_vectors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.dropout import drop_threshold
from ..types import RankSeam, RecommenderWeights, States, StepOps, StepShape, StepTensors
from . import fold_heads, projected_towers, sequence_encoder
from .adam import FlatAdam
from .batch_selection import SelectBatch
from .fold_heads import FoldHeads
from .inbatch_cross_entropy import InbatchCrossEntropy
from .item_vector_gradients import ItemVectorGradients
from .loss_record import LossRecord
from .projected_towers import ProjectedTowers
from .sequence_encoder import DropoutRate, SequenceEncoder
from .shared_vectors import SharedVectors

DTYPES = (torch.float32, torch.bfloat16)  # dtypes of the matrix products


class GpuStep:
    """The ops of a step, their memory, and the window of packed batches that they read.

    Attributes: ops; window int32 [batches, words], packed batches of the shape; counter int32 [1], the index of the
    batch that the next step takes, to which each step adds 1; tables, the hidden states, one tensor for each view;
    seam, what several ranks exchange, None for one rank.
    """

    def __init__(
        self,
        tensors: StepTensors,
        shape: StepShape,
        tables: Sequence[Tensor],
        log_popularity: Tensor,
        window_batches: int,
        dropout: float,
        reads_by_number: bool = True,
    ) -> None:
        """Allocate all memory.

        Args:
            tensors: weights, operands, gradients, Adam's state and record, on one device; with a loss share if the
                shape is of several ranks.
            shape: the bounds of the batches.
            tables: for each view [items + 1, K, D] in the products' dtype, read by item number; without
                reads_by_number [E, K, D], which `set_items` fills with the items to encode before their step.
            log_popularity: float64 [items + 1].
            window_batches: how many packed batches the window holds.
            dropout: probability, 0 for none.
            reads_by_number: see tables.

        Raises ValueError for sizes, dtypes and layouts that the kernels do not take.
        """
        weights = tensors.weights
        dtype = tables[0].dtype
        device = tables[0].device
        self.window = torch.zeros(window_batches, shape.starts()[-1], dtype=torch.int32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.tables = tuple(tables)
        buffer = torch.zeros(shape.starts()[-1], dtype=torch.int32, device=device)
        selected = SelectBatch(self.window, self.counter, buffer, shape, (log_popularity / math.log(2)).float())
        batch = selected.batch
        columns = (selected.column_bias, selected.column_log2_popularity)
        rows = batch.encoded if reads_by_number else torch.arange(shape.encoded, dtype=torch.int32, device=device)
        views = [tower.views for tower in weights.towers]
        fold = FoldHeads(weights, tensors.operands, tensors.gradients, dtype)
        down = [tower.down_weight for tower in tensors.operands.towers]
        gated = weights.towers[0].gate is not None
        towers = ProjectedTowers(fold, down, tables, rows, batch.encoded_count, views, gated, weights.activation, dtype)
        shared = SharedVectors(towers.vectors, shape, dtype) if shape.ranks > 1 else None
        vectors = towers if shared is None else shared
        sequences = (tensor.sequence for tensor in (weights, tensors.operands, tensors.gradients))
        sequence = SequenceEncoder(*sequences, vectors.vectors, batch, shape, _rate(dropout), dtype)
        loss = InbatchCrossEntropy(sequence.state_operands, vectors.vector_operands, batch, *columns, shape, dtype)
        record = LossRecord(
            loss.losses,
            batch.header,
            shape.tile_rows,
            tensors.record,
            tensors.loss,
            tensors.adam.steps,
            self.counter,
            tensors.loss_share,
        )
        collect = ItemVectorGradients(loss, sequence.of_inputs, None if shared is None else shared.of_vectors)
        sequence.connect(loss.of_states)
        towers.connect(collect.of_vectors if shared is None else shared.of_block)
        self.seam = None if shared is None else _seam(towers, shared, record)
        fold.connect(towers.gradients)
        adam = _adam(tensors)
        self.ops = StepOps(selected, fold, towers, sequence, loss, record, collect, adam)

    def set_window(self, window: Tensor) -> None:
        """Copy packed batches, int32 [at most window_batches, words]; the next step takes the first of them."""
        self.window[: len(window)].copy_(window)
        self.counter.zero_()

    def set_items(self, states: Sequence[States]) -> None:
        """Copy the hidden states of a batch's items, a table [N, K, D] for each view, to the start of the tables."""
        for table, view in zip(self.tables, states, strict=True):
            table[: len(view.table)].copy_(view.table)


def _seam(towers: ProjectedTowers, shared: SharedVectors, record: LossRecord) -> RankSeam:
    """Return what the ranks exchange, and what follows or precedes the exchanges."""
    tensors = towers.vectors, shared.gathered, shared.of_gathered, shared.of_block
    return RankSeam(*tensors, shared.spread, shared.order, record.count)


def _adam(tensors: StepTensors) -> FlatAdam:
    """Return Adam on the step's flat buffers."""
    state = tensors.adam
    operands = None if tensors.operand_buffer is state.parameters else tensors.operand_buffer
    buffers = state.parameters, state.gradients, state.means, state.squares, operands
    groups = state.line_groups, state.rates, state.decays
    extras = state.clip_norm, state.averages, state.average_share
    return FlatAdam(*buffers, *groups, state.betas, state.epsilon, state.steps, tensors.record, *extras)


def _rate(probability: float) -> DropoutRate | None:
    """Return the dropout of a probability, or None if it drops nothing."""
    threshold = drop_threshold(probability)
    return DropoutRate(threshold, 1 / (1 - probability)) if threshold else None


def refusal(weights: RecommenderWeights, dtype: torch.dtype) -> str:
    """Return why the Triton step cannot train these weights, or ""; dtype: of the matrix products."""
    if any(tensor.dtype != torch.float32 for tensor in weights.tensors()):
        return "it needs weights of float32"
    if dtype not in DTYPES:
        return f"it needs products in float32 or bfloat16, found {dtype}".replace("torch.", "")
    sizes = weights.towers[0].down_weight.shape
    return (
        fold_heads.refusal(weights)
        or projected_towers.refusal([tower.views for tower in weights.towers], *sizes, len(weights.fusion))
        or sequence_encoder.refusal(
            weights.sequence, len(weights.sequence.tensors[0])
        )  # the loss takes the same widths
    )
