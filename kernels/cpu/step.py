"""The training step of a side-network recommender on a CPU: the ops in C++, and their schedule.

The ops add calls to one schedule. While threads make the calls of a stage, Python prepares those of the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..threads import cores
from ..types import RecommenderBatch, RecommenderWeights, StepOps, StepSeam, StepTensors
from . import fold_heads, sequence_encoder
from .adam import FlatAdamCalls
from .batch_panels import BatchCalls
from .fold_heads import FoldHeadsCalls
from .inbatch_cross_entropy import InbatchCrossEntropyCalls
from .item_vectors import ItemVectorGradientCalls
from .library import DTYPES
from .loss_record import LossRecordCalls
from .projected_towers import SideTowersCalls
from .sequence_encoder import SequenceEncoderCalls
from .step_batch import check_step_batch
from .step_calls import Output, StepCalls
from .step_tensors import check_step_tensors

Room = tuple[int, int, int]  # numbers of items, of rows, and of items whose states there are


class CpuStep:
    """The ops of a step (`ops`), with memory for batches up to a size (`room`), and the vectors that ranks exchange."""

    def __init__(self, tensors: StepTensors, batch: RecommenderBatch, least: Room = (0, 0, 0)) -> None:
        """Allocate the memory.

        Args: tensors: their weights are those for which `refusal` returns ""; batch: the first batch; the memory is one
        eighth larger; least: sizes that the memory holds at least. With `tensors.loss_share` the batches are a rank's
        shares.

        Raises ValueError if the tensors do not fit together, or the batch does not fit them.
        """
        if reason := refusal(tensors.weights):
            raise ValueError(f"weights: {reason}")
        check_step_tensors(tensors)
        self._shared = tensors.loss_share is not None
        check_step_batch(batch, tensors.weights, self._shared)
        # Odd sizes: panels that lie a whole number of pages apart would compete for the same sets of the cache.
        items, rows, encoded = (max(size + size // 8 | 1, before) for size, before in zip(_sizes(batch), least))
        self.room = (items, rows, encoded)
        self._kind = _kind(batch)
        self._weights = tensors.weights
        calls = self._calls = StepCalls(tensors.weights.fusion.dtype, items, rows, encoded)
        weights = tensors.weights
        gradients = tensors.gradients
        selected = BatchCalls(calls, batch.states)
        fold = FoldHeadsCalls(calls, weights, gradients)
        towers = SideTowersCalls(calls, weights, gradients, selected, fold)
        vectors = towers.vectors
        if self._shared:
            vectors = Output(calls.empty(items, len(weights.fusion)))
        sequence = SequenceEncoderCalls(calls, weights, gradients, vectors)
        loss = InbatchCrossEntropyCalls(calls, selected, sequence.states, vectors)
        record = LossRecordCalls(calls, loss.losses, tensors)
        collect = ItemVectorGradientCalls(calls, loss, sequence.of_inputs)
        of_block = Output(calls.empty(encoded, len(weights.fusion))) if self._shared else collect.of_vectors
        towers.connect(of_block)
        sequence.connect(loss.of_states)
        outputs = towers.vectors, vectors, collect.of_vectors, of_block
        self.seam = StepSeam(*(output.tensor for output in outputs))
        adam = FlatAdamCalls(calls, tensors.adam, tensors.record)
        self.ops = StepOps(selected, fold, towers, sequence, loss, record, collect, adam)

    def takes(self, batch: RecommenderBatch) -> bool:
        """Return True if the memory suffices for a batch and neither its views nor the number of threads changed."""
        fits = all(size <= room for size, room in zip(_sizes(batch), self.room))
        return fits and _kind(batch) == self._kind

    def run(
        self,
        batch: RecommenderBatch,
        stages: Sequence[Sequence[Callable[[], None]]],
        on_end: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Run the stages for a batch, one after the other.

        Args:
            batch: the batch that the ops read.
            stages: for each stage the ops' methods (forward, backward, update) that schedule its calls.
            on_end: called with the stage's number when its calls have ended.

        Only one thread may call it at a time. Raises ValueError before any call if the batch does not fit the weights
        or the memory; most calls use its indices without a check. Raises MemoryError if a call lacks memory, ValueError
        if one refuses its sizes; calls that were scheduled but not made are dropped.
        """
        check_step_batch(batch, self._weights, self._shared)
        if not self.takes(batch):
            expected = "at most {} items and {} rows of the first batch's kind".format(*self.room[:2])
            sizes = f"{len(batch.distinct)} items and {len(batch.targets)} rows"
            raise ValueError(f"batch: expected {expected}, found {sizes}")
        schedule = self._calls.schedule
        self._calls.batch = batch

        def lay_out(number: int) -> None:
            """Schedule the calls of a stage; none after the last stage."""
            for method in stages[number] if number < len(stages) else ():
                method()

        try:
            lay_out(0)
            for number in range(len(stages)):
                schedule.run(meanwhile=lambda following=number + 1: lay_out(following))
                on_end(number)
        finally:
            schedule.drop()  # calls that a failure left
            del self._calls.batch


def _sizes(batch: RecommenderBatch) -> Room:
    """Return the numbers of items, of rows, and of items whose states there are."""
    return len(batch.distinct), len(batch.targets), batch.encoded


def _kind(batch: RecommenderBatch) -> tuple[list[torch.Size], torch.dtype, int]:
    """Return (layers and width of each view, their dtype, number of cores), which a step's memory is made for."""
    tables = [view.table for view in batch.states]
    return [table.shape[1:] for table in tables], tables[0].dtype, cores()


def refusal(weights: RecommenderWeights) -> str:
    """Return why the C++ step cannot train these weights, or "" if it can."""
    dtype = weights.fusion.dtype
    d = len(weights.fusion)
    towers = weights.towers
    chains = weights.chains()
    layers, bottleneck, width = towers[0].down_weight.shape
    gate = [] if towers[0].gate is None else [(layers,)]
    of_tower = [*gate, (layers, bottleneck, width), (layers, bottleneck), (layers, width, bottleneck), (layers, width)]
    position = weights.sequence.tensors[0]
    outputs = weights.fusion.shape[1] // len(towers)
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in weights.tensors()):
        return "it needs weights of one dtype, float32 or float64"
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in weights.tensors()):
        return "it needs contiguous weights on a CPU"
    if any([weight.shape for weight in tower[1:] if weight is not None] != of_tower for tower in towers):
        return "it needs towers of one shape"
    if (
        len(chains) != len(towers)
        or weights.fusion.shape[1] != outputs * len(towers)
        or any(
            (*chain.middle.shape, chain.inner.shape[1], len(chain.middle_bias), len(chain.inner_bias))
            != (outputs, len(chain.inner), width, outputs, len(chain.inner))
            for chain in chains
        )
    ):
        return "it needs heads and a fusion that fit the towers"
    if len(weights.fusion_bias) != d or position.shape[1] != d or d % weights.sequence.heads:
        return "it needs a sequence encoder as wide as the item vectors, and a width that its heads divide"
    return fold_heads.refusal(chains) or sequence_encoder.refusal(weights.sequence)
