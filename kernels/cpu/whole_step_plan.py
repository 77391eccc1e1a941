"""The memory and the calls of `whole_step.py`: those of the single ops, one after the other, joined by
`cpp/recommender.cpp`.

The modules of the single ops say what the parts compute and how they are cut.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..threads import cores, shares
from ..types import Chain, RecommenderBatch, RecommenderWeights, Tower
from . import fold_heads, inbatch_cross_entropy, sequence_encoder, side_towers
from .library import PANEL, Schedule, Span, library
from .side_towers import panels_of
from .structs import JointStruct
from .sums import add_sums


class GradientLayout:
    """Where the gradients lie in one block of memory, each at the beginning of a cache line.

    Those of the weights stand in their order; after those of a tower the gradient of its projection, which folding
    takes further.
    """

    def __init__(self, weights: RecommenderWeights) -> None:
        d, (_, _, width) = len(weights.fusion), weights.towers[0].down_weight.shape
        towers = [[weight.shape for weight in tower[1:] if weight is not None] for tower in weights.towers]
        rest = [weight.shape for weight in (*itertools.chain(*weights.heads), weights.fusion, weights.fusion_bias)]
        sequence = [weight.shape for weight in weights.sequence.tensors]
        self.shapes = [*itertools.chain(*([*shapes, None] for shapes in towers)), *rest, *sequence]
        counts = [d * width if shape is None else math.prod(shape) for shape in self.shapes]
        self.sizes = [-(-count // PANEL) * PANEL for count in counts]
        self.starts = list(itertools.accumulate(self.sizes, initial=0))
        starts = [start for shape, start in zip(self.shapes, self.starts) if shape is not None]
        tensors = zip(weights.tensors(), starts, strict=True)
        self.places = [(weight.shape, weight.stride(), start) for weight, start in tensors]
        size = len(towers[0]) + 1  # of a tower: its weights, and its projection
        self.towers = [self.starts[i * size : (i + 1) * size + 1] for i in range(len(towers))]  # with where it ends
        after = len(towers) * size
        self.heads = [self.starts[after + 4 * i : after + 4 * i + 4] for i in range(len(towers))]
        self.fusion, self.fusion_bias, self.sequence = self.starts[after + 4 * len(towers) :][:3]

    def gradients(self, block: Tensor) -> list[Tensor]:
        """Return the gradients of the weights as views of a block."""
        return [block.as_strided(*place) for place in self.places]


class StepPlan:
    """The memory and the calls of batches up to a size. The calls point to fixed memory, but for a batch's tensors."""

    def __init__(
        self, weights: RecommenderWeights, batch: RecommenderBatch, marks: list[list], least: tuple[int, int] = (0, 0)
    ) -> None:
        """least: the least items and rows that there must be room for."""
        self.weights, self.marks, self.cores, self.shape = weights, marks, cores(), _shape(batch)
        # Some more than now, and odd: panels a whole number of pages apart would share the cache's sets.
        sizes = len(batch.distinct), len(batch.targets)
        self.items, self.rows = (max(size + size // 8 | 1, before) for size, before in zip(sizes, least))
        self.dtype, self.library = weights.fusion.dtype, library(weights.fusion.dtype)
        self.layout = GradientLayout(weights)
        block = self._empty(self.layout.starts[-1])
        self.gradients, self.first_gradient = self.layout.gradients(block), block.data_ptr()
        self._plan_towers()
        self._plan_folding()
        self._plan_rest()

    def is_of(self, marks: list[list], batch: RecommenderBatch) -> bool:
        """Return True if the plan is of these weights, views and threads."""
        return marks == self.marks and cores() == self.cores and _shape(batch) == self.shape

    def has_room(self, batch: RecommenderBatch) -> bool:
        """Return True if the memory holds all of the batch."""
        return len(batch.distinct) <= self.items and len(batch.targets) <= self.rows

    def run(self, batch: RecommenderBatch, on_loss: Callable[[Tensor], None]) -> Tensor:
        """Return the loss; leave the gradients of the weights, in their order, in `gradients`."""
        loss, states, forward, backward = self._empty(), *(Schedule(self.dtype) for _ in range(3))
        self._add_weights_and_states(states, batch)

        def lay_out() -> None:
            self._point_to(batch, loss)
            self._add_forward(forward)

        # What Python has to do it does while the others work, each time for what comes next.
        states.run(meanwhile=lay_out)
        forward.run(meanwhile=lambda: self._add_backward(backward))
        backward.run(meanwhile=lambda: on_loss(loss))
        return loss

    def _point_to(self, batch: RecommenderBatch, loss: Tensor) -> None:
        """Point the calls to the batch's tensors."""
        joint = self.joint
        joint.items, joint.rows, joint.loss = len(batch.distinct), len(batch.targets), loss.data_ptr()
        for name in JointStruct.OF_BATCH:
            setattr(joint, name, getattr(batch, name).data_ptr())
        self._cut_towers(joint.items)
        self._cut_rows(batch)

    def _add_weights_and_states(self, run: Schedule, batch: RecommenderBatch) -> None:
        """Schedule what needs only the batch's states: they are gathered, and the heads folded."""
        parts = shares(len(batch.distinct))
        run.add(self.library.gather_panels, side_towers.gathers(batch.states, self.panels, parts))
        for calls, products in zip(self.folds, self.products):
            folded = run.add(self.library.fold_forward, calls)
            add_sums(run, _addresses(products), products[0].numel(), self.dtype, folded)

    def _add_forward(self, run: Schedule) -> None:
        compiled, joint = self.library, self.joint
        outputs = run.add(compiled.side_forward, self.pieces)
        constants = run.add(compiled.joint_constants, [joint])
        vectors = run.add(compiled.joint_vectors, [joint], outputs.to(constants))
        states = run.add(compiled.sequence_forward, self.sequences, vectors)
        losses = run.add(compiled.loss_forward, self.losses, states)
        run.add(compiled.joint_loss, [joint], losses)

    def _add_backward(self, run: Schedule) -> None:
        """Schedule the backward. The forward may be at work: nothing that its calls read is changed."""
        compiled, joint = self.library, self.joint
        sequence = [self._place(self.layout.sequence), *_addresses(self.more_of_sequence)][: len(self.sequences)]
        of_rows = run.add(compiled.loss_backward, self.losses)
        of_states = run.add(compiled.sequence_backward, self.sequences, of_rows)
        of_vectors = _addresses(self.of_vectors[: len(self.losses)])
        of_items = add_sums(run, of_vectors, joint.items * joint.width, self.dtype, of_rows)
        joined = run.add(compiled.joint_backward, [joint], of_states.to(of_items))
        pieces = run.add(compiled.side_backward, self.pieces, joined)
        add_sums(run, sequence, sum(self.sequence_sizes), self.dtype, of_states)
        folded = pieces
        for tower, ended in self._tower_spans(pieces.first):
            start, end = self.layout.towers[tower][0], self.layout.towers[tower][-1]
            parts = [self._place(start), *_addresses(self.more_of_towers[tower])][: self.cut.count(tower)]
            summed = add_sums(run, parts, end - start, self.dtype, ended)
            folded = folded.to(run.add(compiled.fold_backward, self.folds[tower], summed))
        fusion = [self._place(self.layout.fusion), *_addresses(self.more_of_fusion)]
        add_sums(run, fusion, self.weights.fusion.numel(), self.dtype, folded)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="cpu")

    def _place(self, start: int) -> int:
        """Return the address of a gradient."""
        return self.first_gradient + start * self.dtype.itemsize

    def _plan_towers(self) -> None:
        """Allocate the towers' memory; a batch is cut into their calls later."""
        views, kind = self.shape
        first, towers = self.weights.towers[0].down_weight, len(self.weights.towers)
        layers, bottleneck, width = first.shape
        wide, narrow = panels_of(width), panels_of(bottleneck)
        self.panels = torch.empty(len(views), layers, wide, self.items, PANEL, dtype=kind, device="cpu").unbind()
        self.inputs = self._empty(towers, layers, wide, self.items, PANEL)
        self.before = self._empty(towers, layers, narrow, self.items, PANEL)
        self.after = torch.empty_like(self.before) if self.weights.activation == "gelu" else self.before
        self.projected = self._empty(towers, self.items, len(self.weights.fusion))
        self.tower_calls: list[list[ctypes.Structure]] = [[] for _ in self.weights.towers]
        self.more_of_towers: list[list[Tensor]] = [[] for _ in self.weights.towers]

    def _cut_towers(self, items: int) -> None:
        """Set the calls of the towers' pieces, the largest first, and the tower of each."""
        (pieces,) = side_towers.rounds(len(self.tower_calls), items, split=False)
        self.pieces, self.cut = [], []
        for tower, start, count in pieces:
            number = self.cut.count(tower)
            if len(self.tower_calls[tower]) == number:
                self.tower_calls[tower].append(self._tower_call(tower))
            call = self.tower_calls[tower][number]
            call.start, call.count = start, count
            self.pieces.append(call)
            self.cut.append(tower)

    def _tower_spans(self, first: int) -> list[tuple[int, Span]]:
        """Return each tower, in the order in which their pieces begin to end, and the span of its pieces."""
        ends = {tower: i + 1 for i, tower in enumerate(self.cut)}
        return [(tower, Span(first + self.cut.index(tower), first + end)) for tower, end in ends.items()]

    def _tower_call(self, number: int) -> ctypes.Structure:
        """Return one more call of a tower: the first gives the gradients themselves, others what is added to them."""
        tower = self.weights.towers[number]
        call = side_towers.tower_struct(
            self.weights.activation == "gelu",
            *tower[1:],
            self.products[number][0],
            [self.panels[view] for view in tower.views],
            *(tensor[number] for tensor in (self.inputs, self.before, self.after)),
        )
        call.projected, call.upstream = self.projected[number].data_ptr(), self.of_vectors[0].data_ptr()
        names = [f"of_{name}" for name, weight in zip(Tower._fields[1:], tower[1:]) if weight is not None]
        *places, end = self.layout.towers[number]
        addresses = [self._place(place) for place in places]
        if self.tower_calls[number]:
            more = self._empty(end - places[0])
            self.more_of_towers[number].append(more)
            addresses = [more[place - places[0] :].data_ptr() for place in places]
        for name, address in zip([*names, "of_projection"], addresses):
            setattr(call, name, address)
        return call

    def _plan_folding(self) -> None:
        """Allocate the chains' memory and calls; the first part of each gives what others are added to."""
        chains, d, layout = self.weights.chains(), len(self.weights.fusion), self.layout
        parts = [shares(len(chain.inner), fold_heads.MOST_PARTS) for chain in chains]
        self.fold_memory = [
            fold_heads.FoldMemory(self._empty(len(chain.inner), d), self._empty(len(chain.middle))) for chain in chains
        ]
        self.products = [[self._empty(d, chain.inner.shape[1]) for _ in cuts] for chain, cuts in zip(chains, parts)]
        # Zero where a chain has fewer parts.
        self.more_of_fusion = torch.zeros(
            max(map(len, parts)) - 1, *self.weights.fusion.shape, dtype=self.dtype, device="cpu"
        )
        self.biases = self._empty(len(chains), d)
        self.folds: list[list[ctypes.Structure]] = [[] for _ in chains]
        column = 0
        for i, (chain, cuts) in enumerate(zip(chains, parts)):
            for number, part in enumerate(cuts):
                results = {"product": self.products[i][number], "bias": self.biases[i]}
                call = fold_heads.fold_struct(chain, self.fold_memory[i], part, **results)
                call.upstream, call.of_bias = self._place(layout.towers[i][-2]), self._place(layout.fusion_bias)
                for name, place in zip(Chain._fields[1:], layout.heads[i]):
                    setattr(call, f"of_{name}", self._place(place))
                more = self.more_of_fusion[number - 1, 0, column:].data_ptr() if number else None
                call.of_outer = more or self._place(layout.fusion + column)
                self.folds[i].append(call)
            column += chain.outer.shape[1]

    def _plan_rest(self) -> None:
        """Allocate memory for item vectors, rows and their losses."""
        d, sequence = len(self.weights.fusion), self.weights.sequence.tensors
        self.log_multiplicity, self.column = self._empty(self.items), self._empty(self.items)
        self.vectors = self._empty(self.items, d)
        self.x, self.states, self.of_states, self.of_x = self._empty(4, self.rows, d)
        self.probabilities = self._empty(self.rows * PANEL * panels_of(self.items))
        self.row_losses, self.of_row_losses = self._empty(2, self.rows)
        self.of_vectors = self._empty(inbatch_cross_entropy.MOST_WORKERS, self.items, d)
        self.sequence_sizes = [weight.numel() for weight in sequence]
        self.more_of_sequence = self._empty(sequence_encoder.MOST_WORKERS - 1, sum(self.sequence_sizes))
        self.sequence_memory = [self._empty(0)] * sequence_encoder.MOST_WORKERS
        rows = {"x": self.x, "states": self.states, "upstream": self.of_states, "of_x": self.of_x}
        self.of_rows = {name: tensor.data_ptr() for name, tensor in rows.items()}  # of the sequence encoder's calls
        self._plan_sequences()
        self.joint = JointStruct(width=d, towers=len(self.weights.towers), room=self.items)
        self.joint.bias = self.weights.fusion_bias.data_ptr()
        for name in (*JointStruct.OF_PLAN, *JointStruct.GRADIENTS_OF_PLAN):
            setattr(self.joint, name, getattr(self, name).data_ptr())
        self.joint.of_bias = self._place(self.layout.fusion_bias)

    def _cut_rows(self, batch: RecommenderBatch) -> None:
        """Set the calls of the sequence encoder and of the loss."""
        items, rows = self.joint.items, self.joint.rows
        starts = [start for start, _ in shares(rows, sequence_encoder.MOST_WORKERS)]
        users = sequence_encoder.of_whole_users(batch.grid, starts)
        self.sequences, self.losses = self.sequence_calls[: len(users)], []
        size = self.vectors.stride(0) * self.dtype.itemsize  # of a row
        for i, (call, (start, end)) in enumerate(zip(self.sequences, users)):
            sequence_encoder.set_rows(call, batch.grid, batch.dropout, start, end)
            for name, first in self.of_rows.items():
                setattr(call, name, first + start * size)
            self._set_memory(i, call)
        constants = (batch.targets, batch.row_users, batch.history_bits, self.column, self.log_multiplicity)
        constants = inbatch_cross_entropy.LossConstants(*constants)
        probabilities = self.probabilities[: rows * PANEL * panels_of(items)].view(rows, -1)
        queries, vectors = self.states[:rows], self.vectors[:items]
        for i, part in enumerate(shares(rows, inbatch_cross_entropy.MOST_WORKERS)):
            call = inbatch_cross_entropy.loss_struct(constants, queries, vectors, probabilities, self.row_losses, part)
            call.upstream, call.of_vectors = self.of_row_losses[part[0] :].data_ptr(), self.of_vectors[i].data_ptr()
            call.of_queries = self.of_states[part[0] :].data_ptr()
            self.losses.append(call)

    def _set_memory(self, i: int, call: ctypes.Structure) -> None:
        """Give the i-th call of the sequence encoder memory for what it leaves for its backward."""
        needed = sequence_encoder.memory_of(call, self.dtype)
        if self.sequence_memory[i].numel() < needed:
            self.sequence_memory[i] = self._empty(needed + needed // 8)
        call.memory, call.memory_size = self.sequence_memory[i].data_ptr(), self.sequence_memory[i].numel()

    def _plan_sequences(self) -> None:
        """Make the sequence encoder's calls: the first leaves the gradients, the others what is added to them."""
        sequence, sizes = self.weights.sequence, self.sequence_sizes
        blocks = sequence_encoder.blocks_at(_addresses(sequence.tensors))
        common = sequence.tensors, sequence.heads, sequence.epsilon, blocks
        calls = [sequence_encoder.weights_struct(*common) for _ in range(sequence_encoder.MOST_WORKERS)]
        # Whole panels each, so none is padded in the layout.
        for call, first in zip(calls, [self._place(self.layout.sequence), *_addresses(self.more_of_sequence)]):
            sequence_encoder.set_gradients(call, sequence_encoder.places_of(first, sizes, self.dtype))
        self.sequence_calls = calls


def _shape(batch: RecommenderBatch) -> tuple[list[torch.Size], torch.dtype]:
    """Return layers and width of each view, and the dtype of all."""
    tables = [view.table for view in batch.states]
    return [table.shape[1:] for table in tables], tables[0].dtype


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
