"""The side network as a pair of a training step on a CPU: from hidden states in panels to item vectors, and back.

The items of all towers are divided into one piece for each core (`rounds` in side_towers.py). If two cores share a
tower, each writes gradients of its weights, and these are added up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..types import RecommenderWeights, Tower
from .batch_panels import BatchCalls
from .fold_heads import FoldHeadsCalls
from .library import PANEL
from .schedule import AT_ONCE, Span
from .side_towers import panels_of, rounds, tower_struct
from .step_calls import GradientParts, Output, StepCalls, addresses
from .structs import ItemVectorsStruct, TowerStruct


class SideTowersCalls:
    """The pair: `vectors` [encoded, d] is the sum of the towers' projected outputs and of all biases."""

    def __init__(
        self,
        calls: StepCalls,
        weights: RecommenderWeights,
        gradients: RecommenderWeights,
        batch: BatchCalls,
        fold: FoldHeadsCalls,
    ) -> None:
        """Allocate the memory; batch: the hidden states; fold: each tower's projection, whose gradient it gets."""
        self._calls = calls
        self._weights = weights
        self._batch = batch
        self._fold = fold
        towers, d = len(weights.towers), len(weights.fusion)
        layers, bottleneck, width = weights.towers[0].down_weight.shape
        wide, narrow = panels_of(width), panels_of(bottleneck)
        items = calls.encoded
        self._inputs = calls.empty(towers, layers, wide, items, PANEL)
        self._before = calls.empty(towers, layers, narrow, items, PANEL)
        self._after = torch.empty_like(self._before) if weights.activation == "gelu" else self._before
        self._projected = calls.empty(towers, items, d)
        self.vectors = self._of_vectors = Output(calls.empty(items, d))
        self._parts = [
            GradientParts([weight for weight in tower[1:] if weight is not None]) for tower in gradients.towers
        ]
        self._of_projections = [[calls.empty(d, width)] for _ in weights.towers]  # [tower][worker of the tower]
        self._structs: list[list[TowerStruct]] = [[] for _ in weights.towers]  # [tower][worker of the tower]
        self._sum = ItemVectorsStruct(width=d, towers=towers, room=items)
        self._sum.projected, self._sum.biases = addresses([self._projected, fold.biases])
        self._sum.bias, self._sum.vectors = addresses([weights.fusion_bias, self.vectors.tensor])
        self._sum.of_bias = gradients.fusion_bias.data_ptr()
        self._ended = AT_ONCE
        fold.connect([parts[0] for parts in self._of_projections], self._add_up)

    def connect(self, of_vectors: Output) -> None:
        """Set the tensor [encoded, d] from which the backward reads the gradient of the item vectors."""
        self._of_vectors = of_vectors
        self._sum.of_vectors = of_vectors.tensor.data_ptr()

    def forward(self) -> None:
        """Schedule the item vectors of the current batch."""
        self._cut()
        ready = self._batch.done.to(self._fold.done)
        outputs = self._calls.add("side_forward", self._pieces, ready)
        self.vectors.done = self._calls.add("item_vectors", [self._sum], outputs)

    def backward(self) -> None:
        """Schedule the gradients of the fusion's bias and of the towers; the fold's backward calls `_add_up`."""
        biases = self._calls.add("item_vectors_backward", [self._sum], self._of_vectors.done)
        self._ended = self._calls.add("side_backward", self._pieces, self._of_vectors.done.to(biases))

    def _add_up(self) -> Iterator[tuple[int, Span]]:
        """Schedule the sums of the workers' gradients, tower by tower, in the order in which their pieces start.

        Yields each tower's index, and the calls after which the gradient of its projection is complete.
        """
        last = {tower: number + 1 for number, tower in enumerate(self._towers)}
        for tower, end in last.items():
            start = self._towers.index(tower)
            workers = self._towers.count(tower)
            ended = Span(self._ended.first + start, self._ended.first + end)
            of_projections = self._of_projections[tower][:workers]
            summed = self._calls.add_sums(addresses(of_projections), of_projections[0].numel(), ended)
            self._parts[tower].add_up(self._calls, workers, ended)
            yield tower, summed

    def _cut(self) -> None:
        """Divide the current batch's items into pieces; set `_pieces`, the largest first, and the tower of each."""
        items = self._sum.items = self._calls.batch.encoded
        (pieces,) = rounds(len(self._structs), items, split=False)
        self._pieces: list[TowerStruct] = []
        self._towers: list[int] = []
        for tower, start, count in pieces:
            number = self._towers.count(tower)
            structs = self._structs[tower]
            if len(structs) == number:
                structs.append(self._struct(tower, number))
            struct = structs[number]
            struct.start = start
            struct.count = count
            self._pieces.append(struct)
            self._towers.append(tower)

    def _struct(self, number: int, worker: int) -> TowerStruct:
        """Return a call for a worker of tower `number`: worker 0 writes the gradients, others write parts of them."""
        tower, of_projections = self._weights.towers[number], self._of_projections[number]
        if len(of_projections) == worker:
            of_projections.append(torch.empty_like(of_projections[0]))
        struct = tower_struct(
            self._weights.activation == "gelu",
            *tower[1:],
            self._fold.projections[number],
            [self._batch.panels[view] for view in tower.views],
            *(memory[number] for memory in (self._inputs, self._before, self._after)),
        )
        struct.projected = self._projected[number].data_ptr()
        struct.upstream = self._sum.of_vectors
        names = [name for name, weight in zip(Tower._fields[1:], tower[1:]) if weight is not None]
        for name, place in zip(names, self._parts[number].places(worker), strict=True):
            setattr(struct, f"of_{name}", place)
        struct.of_projection = of_projections[worker].data_ptr()
        return struct
