"""The tensors that cross the kernels' door, under names: states, towers, sequences, and a training step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

OUTER_WEIGHTS = 3  # of a sequence encoder, before those of its blocks
BLOCK_WEIGHTS = 12  # of each block
SITES_PER_BLOCK = 3  # of dropout: attention weights, after attention, after the feed-forward; site 0 is the input
FLAT_LINE = 32  # numbers of flat storage that belong to one group of rates
FLAT_ALIGNMENT = 2 * FLAT_LINE  # numbers: each tensor in flat storage starts at a multiple, 128 bytes even in bfloat16


class Forward(Protocol):
    """An op of a step that has no gradient."""

    def forward(self) -> None: ...


class Backward(Protocol):
    """An op of a step that only passes gradients on."""

    def backward(self) -> None: ...


class Pair(Forward, Backward, Protocol):
    """An op of a step, and its gradients."""


class Update(Protocol):
    """The optimizer of a step."""

    def update(self) -> None: ...


class States(NamedTuple):
    """One view's hidden states [M, K, D] and which of them to read: row numbers int64 [N], or None for all in order."""

    table: Tensor
    rows: Tensor | None = None


class Tower(NamedTuple):
    """A side tower over K kept layers of width D, bottleneck R, and the numbers of the views that it reads."""

    views: tuple[int, ...]  # one view, or (0, 1)
    gate: Tensor | None  # [K]
    down_weight: Tensor  # [K, R, D]
    down_bias: Tensor  # [K, R]
    up_weight: Tensor  # [K, D, R]
    up_bias: Tensor  # [K, D]


class Chain(NamedTuple):
    """Three linear maps that follow one another, [D] to [H] to [d'] to [d]; the last has no bias."""

    outer: Tensor  # [d, d']
    middle: Tensor  # [d', H]
    middle_bias: Tensor  # [d']
    inner: Tensor  # [H, D]
    inner_bias: Tensor  # [H]


class SequenceGrid(NamedTuple):
    """Where R packed rows stand: right-aligned histories on a grid of users and positions."""

    slots: Tensor  # int64 [R], ascending: user * length + position; padding rows of a batch may share one
    users: int  # of the grid
    length: int  # positions of the grid, at most the encoder's


class SequenceDropout(NamedTuple):
    """One step's stateless dropout, as `sequence_dropout` makes it: every mask bit is a hash."""

    prefix: int | Tensor  # the hash of seed and step
    threshold: int  # of 2^32: hashes below it drop
    scale: float  # of a number that stays
    users: Tensor  # int64 [users]: the numbers of the grid's users


class EncoderBlock(NamedTuple):
    """A transformer block's weights: attention without biases, then a feed-forward of width f; both with a norm."""

    query: Tensor  # [d, d], as the next three
    key: Tensor
    value: Tensor
    output: Tensor
    attention_scale: Tensor  # [d]
    attention_shift: Tensor  # [d]
    feed_in: Tensor  # [f, d]
    feed_in_bias: Tensor  # [f]
    feed_out: Tensor  # [d, f]
    feed_out_bias: Tensor  # [d]
    feed_scale: Tensor  # [d]
    feed_shift: Tensor  # [d]


class SequenceWeights(NamedTuple):
    """SASRec's weights: position [P, d], scale and shift [d] of the first norm, then each block's as `EncoderBlock`."""

    tensors: list[Tensor]
    heads: int
    epsilon: float  # of the norms

    def blocks(self) -> list[EncoderBlock]:
        """Return the weights of each block."""
        starts = range(OUTER_WEIGHTS, len(self.tensors), BLOCK_WEIGHTS)
        return [EncoderBlock(*self.tensors[start : start + BLOCK_WEIGHTS]) for start in starts]


class RecommenderWeights(NamedTuple):
    """All trained weights of a side-network recommender whose towers have one shape."""

    towers: list[Tower]
    activation: str
    heads: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # by tower: a `Chain` without its outer map
    fusion: Tensor  # [d, towers d']: the outer maps side by side
    fusion_bias: Tensor  # [d]
    sequence: SequenceWeights

    def tensors(self) -> list[Tensor]:
        """Return all weights in one list."""
        towers = [weight for tower in self.towers for weight in tower[1:] if weight is not None]
        return [*towers, *itertools.chain(*self.heads), self.fusion, self.fusion_bias, *self.sequence.tensors]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> RecommenderWeights:
        """Return the same roles, each played by what `change` makes of the weight."""
        return RecommenderWeights(
            [
                Tower(tower.views, *(None if weight is None else change(weight) for weight in tower[1:]))
                for tower in self.towers
            ],
            self.activation,
            [tuple(map(change, head)) for head in self.heads],
            change(self.fusion),
            change(self.fusion_bias),
            self.sequence._replace(tensors=list(map(change, self.sequence.tensors))),
        )

    def chains(self) -> list[Chain]:
        """Return the three maps that follow each tower."""
        parts = self.fusion.detach().chunk(len(self.heads), dim=1)
        return [Chain(part, *head) for part, head in zip(parts, self.heads)]


class RecommenderBatch(NamedTuple):
    """A batch of V distinct items and R rows."""

    states: list[States]  # of the items, by view
    distinct: Tensor  # int64 [V]: numbers of the items
    multiplicity: Tensor  # int64 [V]
    inputs: Tensor  # int64 [R]: the row's item, an index into the distinct ones
    targets: Tensor  # int64 [R]: the next item
    row_users: Tensor  # int64 [R]
    history_bits: Tensor  # int32 [users, words]
    row_weights: Tensor  # float64 [R]: the row's part in the loss
    step: int  # of the run
    log_popularity: Tensor  # float64 [items of the catalogue + 1]
    grid: SequenceGrid  # where the rows stand
    dropout: SequenceDropout | None


class AdamState(NamedTuple):
    """A parameter and what Adam keeps of it."""

    parameter: Tensor
    mean: Tensor  # exp_avg
    square: Tensor  # exp_avg_sq
    steps: Tensor  # taken so far: fp32 scalar


class FlatAdamState(NamedTuple):
    """Flat buffers of n numbers, with Adam's state; each line of `FLAT_LINE` numbers belongs to one group of rates."""

    parameters: Tensor  # [n]
    gradients: Tensor  # [n]
    means: Tensor  # [n]
    squares: Tensor  # [n]
    line_groups: Tensor  # uint8 [n / 32]
    rates: Tensor  # of each group: float64 on a CPU, fp32 on a GPU
    decays: Tensor  # likewise
    steps: Tensor  # taken, the one at hand included: fp32 scalar
    betas: tuple[float, float]
    epsilon: float


class TowerGradients(NamedTuple):
    """Gradients that flow back from T towers into what was folded and prepared for them; all fp32."""

    of_coefficients: Tensor  # [T, K, 3]
    of_down: Tensor  # [T, K, R, D]: from the products with the states alone
    of_bias: Tensor  # [T, K, R]
    of_composites: Tensor  # [T, K, R, K, R]: read where the second layer lies below the first
    of_projected_up: Tensor  # [T, K, R, d]
    of_projections: Tensor  # [T, d, D]: from the products with the states alone
    of_vector_bias: Tensor  # [d]


class StepTensors(NamedTuple):
    """The tensors that a training step reads and writes beside its batch."""

    weights: RecommenderWeights
    operands: RecommenderWeights  # the weights themselves, or in the products' dtype
    gradients: RecommenderWeights  # overwritten, not added to
    adam: FlatAdamState
    operand_buffer: Tensor  # of all operands, in the layout of the parameters
    record: Tensor  # float64 [4]: the sum of losses over rows, rows, the first failed step from 1 or 0, its loss
    loss: Tensor  # of the batch, a scalar


class StepOps(NamedTuple):
    """The ops of a training step, each with memory of its own: what `FusedStep` puts together on either device.

    Forward and backward take no arguments and wait for nothing. On a GPU they launch kernels; on a CPU they add calls
    to a schedule that the pairs share.
    """

    batch: Forward
    fold: Pair
    towers: Pair
    sequence: Pair
    loss: Pair
    record: Forward
    collect: Backward
    adam: Update


class WindowedStep(Protocol):
    """The ops of a step on a GPU, with all their memory and the window of packed batches that they read."""

    ops: StepOps
    window: Tensor  # int32 [batches, words]

    def set_window(self, window: Tensor) -> None:
        """Copy packed batches into the window, and begin with the first."""

    def set_items(self, states: Sequence[States]) -> None:
        """Copy the gathered hidden states of a batch's items."""


HEADER = ("distinct", "rows", "tiles", "users", "step", "prefix", "occurrences")  # a batch's true counts and step
HEADER_WORDS = 8
FIELD_ALIGNMENT = 32  # int32 words: 128 bytes
TILE_ROWS = (16, 32, 64)  # of a tile


class StepShape(NamedTuple):
    """The sizes of a run's batches on a GPU: bounds that no batch of the run passes."""

    users: int  # U
    distinct: int  # V, a multiple of 32
    tiles: int  # T: of rows; a user's rows stand in one tile
    tile_rows: int  # one of TILE_ROWS
    positions: int  # P: the most inputs of a history, at most tile_rows

    @property
    def rows(self) -> int:
        """Rows of all tiles, M."""
        return self.tiles * self.tile_rows

    @property
    def words(self) -> int:
        """Words of 32 history bits a user, W."""
        return self.distinct // 32

    @property
    def occurrences(self) -> int:
        """The most slots that the users' histories have."""
        return self.rows + self.users

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each field of a `StepBatch`, in their order in a packed batch."""
        rows = ("inputs", "targets", "row_users", "positions")
        return {
            "header": (HEADER_WORDS,),
            "users": (self.users,),
            "distinct": (self.distinct,),
            "offsets": (self.distinct + 1,),
            **{name: (self.rows,) for name in rows},
            "occurrences": (self.occurrences,),
            "history_bits": (self.words, self.users + 1),
        }

    def starts(self) -> list[int]:
        """Return where each field of a packed batch starts, then where the batch ends, in int32 words."""
        sizes = [-(-math.prod(shape) // FIELD_ALIGNMENT) * FIELD_ALIGNMENT for shape in self.fields().values()]
        return list(itertools.accumulate(sizes, initial=0))


class StepBatch(NamedTuple):
    """A batch as the GPU's step reads it: int32 views of one buffer, each as large as the run's `StepShape` says.

    Beyond the true counts of the header, users are -1, distinct and targets 0, inputs -1, row_users U, positions 0, and
    offsets repeat the last. A user's rows stand in one tile, one after the other, in the order of the history; between
    and after users a tile may have rows that are none: their input is -1.
    """

    header: Tensor  # [HEADER_WORDS]: in the order of HEADER; prefix is the dropout's hash of seed and step, as uint32
    users: Tensor  # [U]: user numbers, which the dropout hashes
    distinct: Tensor  # [V]: ascending item numbers
    offsets: Tensor  # [V + 1]: the occurrences of distinct item v are offsets[v] .. offsets[v + 1] - 1
    inputs: Tensor  # [M]: each row's own item, an index into distinct
    targets: Tensor  # [M]: its next item, likewise
    row_users: Tensor  # [M]: the row's user within the batch, 0 .. U - 1
    positions: Tensor  # [M]: 0 .. P - 1: histories are right-aligned
    occurrences: Tensor  # [M + U]: 4 * row + 1 (the item is input of row) + 2 (it is the target of row - 1)
    history_bits: Tensor  # [W, U + 1]: bit v % 32 of word [v // 32, user]: distinct item v is in the user's history

    @classmethod
    def of(cls, buffer: Tensor, shape: StepShape) -> StepBatch:
        """Return the batch that lies in a packed buffer, int32 [shape.starts()[-1]]; nothing is copied."""
        starts = shape.starts()
        parts = zip(starts, shape.fields().values())
        return cls(*(buffer[start : start + math.prod(size)].view(size) for start, size in parts))
