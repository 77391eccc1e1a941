"""Named tuples of the tensors that ops take: states, towers, sequences, and a training step.

Letters in shapes: N items, M rows of a table or of a step's tiles, K layers, R bottleneck (in a batch: rows), D width
of hidden states, d width of item vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OUTER_WEIGHTS = 3  # tensors of a sequence encoder before those of its blocks: positions, scale and shift of a norm
BLOCK_WEIGHTS = 12  # tensors of a block: the fields of `EncoderBlock`
SITES_PER_BLOCK = (
    3  # places with dropout: attention weights, after attention, after the feed-forward; site 0: the input
)
FLAT_LINE = 32  # numbers in a line of flat storage; a line has one learning rate and one weight decay
FLAT_ALIGNMENT = 2 * FLAT_LINE  # each tensor in flat storage starts at a multiple of this: 128 bytes even in bfloat16


class Forward(Protocol):
    """An op of a step that has only a forward."""

    def forward(self) -> None:
        """Launch or schedule the op; it writes the tensors that its class names."""


class Backward(Protocol):
    """An op of a step that has only a backward."""

    def backward(self) -> None:
        """Launch or schedule the gradients; they are written into the tensors that the class names."""


class Pair(Forward, Backward, Protocol):
    """An op of a step with its forward and its backward."""


class Update(Protocol):
    """The optimizer of a step."""

    def update(self) -> None:
        """Launch or schedule the update of all parameters."""


class States(NamedTuple):
    """The hidden states of one view, and the rows of its table to read."""

    table: Tensor  # [M, K, D]
    rows: Tensor | None = None  # int64 [N]: row numbers; None: all rows in order


class Tower(NamedTuple):
    """The weights of a side tower over K layers of width D with bottleneck R, and the views that it reads."""

    views: tuple[int, ...]  # (0,), (1,) or (0, 1): indices of views
    gate: Tensor | None  # [K]; the weight of a layer's hidden state is sigmoid(gate / 0.1)
    down_weight: Tensor  # [K, R, D]
    down_bias: Tensor  # [K, R]
    up_weight: Tensor  # [K, D, R]
    up_bias: Tensor  # [K, D]


class Chain(NamedTuple):
    """Three linear maps in a row, inner [D -> H], middle [H -> d'] and outer [d' -> d]; the outer map has no bias."""

    outer: Tensor  # [d, d']
    middle: Tensor  # [d', H]
    middle_bias: Tensor  # [d']
    inner: Tensor  # [H, D]
    inner_bias: Tensor  # [H]


class SequenceGrid(NamedTuple):
    """The user and position of each of R packed rows.

    Histories are right-aligned: the last item of every history stands at position length - 1.
    """

    slots: Tensor  # int64 [R], ascending: user * length + position; padding rows of a batch may share a slot
    users: int  # number of users
    length: int  # number of positions, at most as many as the encoder has


class AddedScores(NamedTuple):
    """Values to add to the scores of a few items of each of U users, beside the dot products: a sparse matrix."""

    offsets: Tensor  # int64 [U + 1]: user u has the entries offsets[u]:offsets[u + 1]
    items: Tensor  # int64 [E]: row numbers of items, ascending within a user, each once
    values: Tensor  # [E], in the dtype of the queries

    def part(self, first: int, count: int) -> AddedScores:
        """Return the entries of the users `first` to `first + count - 1`."""
        offsets = self.offsets[first : first + count + 1]
        here = slice(int(offsets[0]), int(offsets[-1]))
        return AddedScores(offsets - offsets[0], self.items[here], self.values[here])

    def users(self) -> Tensor:
        """Return the user of each entry, int64 [E], ascending."""
        users = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return users.repeat_interleave(self.offsets.diff(), output_size=len(self.items))

    def values_of(self, users: Tensor, items: Tensor, catalogue: int) -> Tensor:
        """Return what is added to the score of items[i] for users[i], 0 where nothing is: [M].

        users, items: int64 [M]. catalogue: number of items.
        """
        if not len(self.items):
            return self.values.new_zeros(len(items))
        keys = self.users() * catalogue + self.items  # ascending
        wanted = users * catalogue + items
        places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return self.values[places].masked_fill(keys[places] != wanted, 0)


class SequenceDropout(NamedTuple):
    """The dropout of one step, as `sequence_dropout` makes it: a hash decides each mask bit."""

    prefix: int | Tensor  # hash of seed and step
    threshold: int  # a number is dropped if its hash, of 32 bits, is below this
    scale: float  # 1 / (1 - probability), the factor of numbers that are not dropped
    users: Tensor  # int64 [users]: the user numbers that enter the hash


class EncoderBlock(NamedTuple):
    """The weights of a transformer block: attention without biases, then a feed-forward of f units, each with norm."""

    query: Tensor  # [d, d], like key, value and output
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
    """The weights of SASRec, and its settings."""

    tensors: list[Tensor]  # position [P, d], scale [d] and shift [d] of the first norm, then each `EncoderBlock`
    heads: int
    epsilon: float  # added to the variance in each norm

    def blocks(self) -> list[EncoderBlock]:
        """Return the weights of each block."""
        starts = range(OUTER_WEIGHTS, len(self.tensors), BLOCK_WEIGHTS)
        return [EncoderBlock(*self.tensors[start : start + BLOCK_WEIGHTS]) for start in starts]


class RecommenderWeights(NamedTuple):
    """All trained weights of a side-network recommender; its towers have one shape."""

    towers: list[Tower]
    activation: str  # "relu" or "gelu"
    heads: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # of each tower: the fields of `Chain` after outer
    fusion: Tensor  # [d, towers d']: the outer maps of all chains side by side
    fusion_bias: Tensor  # [d]
    sequence: SequenceWeights

    def tensors(self) -> list[Tensor]:
        """Return all weights: towers, heads, fusion and its bias, sequence encoder."""
        towers = [weight for tower in self.towers for weight in tower[1:] if weight is not None]
        return [*towers, *itertools.chain(*self.heads), self.fusion, self.fusion_bias, *self.sequence.tensors]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> RecommenderWeights:
        """Return a copy in which `change(weight)` replaces each weight."""
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
        """Return the three maps that follow each tower; outer is a detached view of fusion."""
        parts = self.fusion.detach().chunk(len(self.heads), dim=1)
        return [Chain(part, *head) for part, head in zip(parts, self.heads)]


class RecommenderBatch(NamedTuple):
    """A training batch of V distinct items and R rows; a row is a position of a history that has a next item."""

    states: list[States]  # hidden states of the V items, one entry for each view
    distinct: Tensor  # int64 [V]: item numbers in the catalogue
    multiplicity: Tensor  # int64 [V]: how often each item occurs in the batch
    inputs: Tensor  # int64 [R]: index of the row's item in `distinct`
    targets: Tensor  # int64 [R]: index of the next item in `distinct`
    row_users: Tensor  # int64 [R]: the row's user, an index of history_bits
    history_bits: Tensor  # int32 [users, words]: bit v % 32 of word v // 32: item v is in the user's history
    row_weights: Tensor  # float64 [R]: weight of the row's loss in the batch's; 0 for padding
    step: int  # number of the step in the run, from 0
    log_popularity: Tensor  # float64 [items of the catalogue + 1], by item number
    grid: SequenceGrid  # user and position of each row
    dropout: SequenceDropout | None
    block: slice | None = None  # of a rank's share: those of the V items whose states there are; None: of all

    @property
    def encoded(self) -> int:
        """Return the number of items whose states there are."""
        return len(self.distinct) if self.block is None else self.block.stop - self.block.start


class AdamState(NamedTuple):
    """A parameter with its Adam state; in brackets the names of torch.optim.Adam."""

    parameter: Tensor
    mean: Tensor  # first moment (exp_avg), shaped like the parameter
    square: Tensor  # second moment (exp_avg_sq), shaped like the parameter
    steps: Tensor  # number of steps taken so far (step), an fp32 scalar


class FlatAdamState(NamedTuple):
    """All parameters in one buffer of n numbers, with Adam's state; a line of `FLAT_LINE` numbers has one group."""

    parameters: Tensor  # [n]
    gradients: Tensor  # [n]
    means: Tensor  # [n]
    squares: Tensor  # [n]
    line_groups: Tensor  # uint8 [n / 32]: the group of each line
    rates: Tensor  # [groups]: learning rates, float64 on a CPU, fp32 on a GPU
    decays: Tensor  # [groups]: weight decays, in the dtype of rates
    steps: Tensor  # number of steps including the current one, an fp32 scalar
    betas: tuple[float, float]
    epsilon: float
    clip_norm: float | None = None  # the largest L2 norm of all gradients together; None for any
    averages: Tensor | None = None  # [n]: moving averages of the parameters; None for none
    average_share: float = 1.0  # least share of the new parameters in the averages, which is 9 / (10 + steps) at first


class TowerGradients(NamedTuple):
    """Gradients of the operands that the fold prepares for T towers (`gpu/fold_heads.py`); all fp32."""

    of_coefficients: Tensor  # [T, K, 3]
    of_down: Tensor  # [T, K, R, D]: only the part through the products with hidden states
    of_bias: Tensor  # [T, K, R]
    of_composites: Tensor  # [T, K, R, K, R]: read only where the second layer lies below the first
    of_projected_up: Tensor  # [T, K, R, d]
    of_projections: Tensor  # [T, d, D]: only the part through the products with hidden states
    of_vector_bias: Tensor  # [d]


class StepTensors(NamedTuple):
    """The tensors that a training step reads and writes, apart from its batch."""

    weights: RecommenderWeights  # views of adam.parameters
    operands: RecommenderWeights  # the weights in the dtype of the matrix products; the same tensors if that is equal
    gradients: RecommenderWeights  # views of adam.gradients; a step overwrites them
    adam: FlatAdamState
    operand_buffer: Tensor  # the buffer that the operands are views of, in the layout of the parameters
    record: Tensor  # float64 [4]: sum of row losses; number of rows; 1 + the first failed step, or 0; the loss there
    loss: Tensor  # the batch's loss, a scalar
    # On several ranks [2]: a rank's part of the loss, and its rows. The record op writes them, and nothing of the
    # record, the loss and adam.steps, which are of the whole batch. None on one rank.
    loss_share: Tensor | None = None


class StepSeam(NamedTuple):
    """The item vectors of a step, and their gradients, which several ranks exchange: V items, of which a rank has N.

    On one rank the two tensors of each pair are one.
    """

    block_vectors: Tensor  # [N, d], written by the towers
    vectors: Tensor  # [V, d], read by the sequence encoder and the loss
    of_vectors: Tensor  # [V, d], written by `collect`
    of_block_vectors: Tensor  # [N, d], read by the towers' backward


class StepOps(NamedTuple):
    """The ops of a training step, each with its memory. The trainer's `FusedStep` runs them on either device.

    Forward and backward take no arguments and return at once. On a GPU they launch kernels; on a CPU they add calls to
    one schedule.
    """

    batch: Forward  # select or copy the batch
    fold: Pair  # fold each tower's heads and the fusion into one projection
    towers: Pair  # hidden states to item vectors
    sequence: Pair  # item vectors to hidden states of the sequence encoder
    loss: Pair
    record: Forward  # write the batch's loss and count the step
    collect: Backward  # add up the gradients of the item vectors
    adam: Update


class RankSeam(NamedTuple):
    """The tensors that ranks exchange in a step on a GPU: N blocks of E vectors, of all ranks one after the other.

    The last three are launches: after the vectors are gathered, before their gradients are added up, and after the
    weights' gradients and the loss shares are.
    """

    block_vectors: Tensor  # [E, d], written by the towers
    gathered: Tensor  # [N E, d]
    of_gathered: Tensor  # [N E, d], the gradients
    of_block_vectors: Tensor  # [E, d], read by the towers' backward
    spread: Callable[[], None]  # copy the gathered vectors to their columns
    order: Callable[[], None]  # copy the columns' gradients to `of_gathered`
    count: Callable[[], None]  # record the loss, and count the step


class WindowedStep(Protocol):
    """The ops of a step on a GPU, their memory, and a window: packed batches that are ready on the device."""

    ops: StepOps
    window: Tensor  # int32 [batches, words]
    seam: RankSeam | None  # None for one rank

    def set_window(self, window: Tensor) -> None:
        """Copy packed batches, int32 [batches, words], into the window; the next step takes the first of them."""

    def set_items(self, states: Sequence[States]) -> None:
        """Copy the hidden states of the items to encode in the next batch, [N, K, D] for each view, to the device."""


HEADER = ("distinct", "rows", "tiles", "users", "step", "prefix", "occurrences")  # true counts of a batch, and its step
HEADER_WORDS = 8
FIELD_ALIGNMENT = 32  # int32 words: each field of a packed batch starts at a multiple of 128 bytes
TILE_ROWS = (16, 32, 64)  # the possible numbers of rows in a tile


class StepShape(NamedTuple):
    """Upper bounds of the batch sizes of a run on a GPU; all buffers have these sizes.

    Where several ranks train together, users and tiles are those of one rank, and the distinct items those of all.
    """

    users: int  # U
    distinct: int  # V, a multiple of 32
    tiles: int  # T, groups of rows; all rows of a user stand in one tile
    tile_rows: int  # rows of a tile, one of TILE_ROWS
    positions: int  # P, inputs of the longest history, at most tile_rows
    ranks: int = 1  # that train together

    @property
    def rows(self) -> int:
        """Return the number of rows in all tiles, M."""
        return self.tiles * self.tile_rows

    @property
    def words(self) -> int:
        """Return the number of 32-bit words that hold one user's history bits, W."""
        return self.distinct // 32

    @property
    def occurrences(self) -> int:
        """Return an upper bound on the occurrences of items, as input or target, in a batch."""
        return self.rows + self.users

    @property
    def encoded(self) -> int:
        """Return an upper bound on the items that a rank encodes, E, a multiple of 32; V for one rank."""
        return -(-self.distinct // (32 * self.ranks)) * 32

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each field of a `StepBatch`, in the order of the fields in a packed batch."""
        rows = ("inputs", "targets", "row_users", "positions")
        fields: dict[str, tuple[int, ...]] = {
            "header": (HEADER_WORDS,),
            "users": (self.users,),
            "distinct": (self.distinct,),
            "offsets": (self.distinct + 1,),
            **{name: (self.rows,) for name in rows},
            "occurrences": (self.occurrences,),
            "history_bits": (self.words, self.users + 1),
        }
        if self.ranks > 1:
            fields |= {"whole_offsets": (self.distinct + 1,), "encoded_count": (1,), "encoded": (self.encoded,)}
        return fields

    def starts(self) -> list[int]:
        """Return the offset of each field of a packed batch, then the size of the batch, in int32 words."""
        sizes = [-(-math.prod(shape) // FIELD_ALIGNMENT) * FIELD_ALIGNMENT for shape in self.fields().values()]
        return list(itertools.accumulate(sizes, initial=0))


class StepBatch(NamedTuple):
    """A packed batch, as the step on a GPU reads it: int32 views of one buffer with the sizes of a `StepShape`.

    The header has the true counts. Entries beyond them are padding: users -1, distinct 0, targets 0, inputs -1,
    row_users U, positions 0, and offsets repeat the last one. The rows of a user stand in one tile, one after the
    other, in the order of the history. A tile may have padding rows between users and after them; their input is -1.

    Where several ranks train together, a rank has the rows of its users, and the columns are the items of all users.
    Rank r of N encodes the distinct items r, r + N, r + 2 N and so on.
    """

    header: Tensor  # [HEADER_WORDS]: in the order of HEADER; rows: of all ranks; prefix: a uint32, dropout's hash
    users: Tensor  # [U]: the user numbers that enter dropout's hash
    distinct: Tensor  # [V]: ascending item numbers
    offsets: Tensor  # [V + 1]: the occurrences of distinct item v are offsets[v] .. offsets[v + 1] - 1
    inputs: Tensor  # [M]: index of the row's item in distinct
    targets: Tensor  # [M]: index of the next item in distinct
    row_users: Tensor  # [M]: the row's user within the batch, 0 .. U - 1
    positions: Tensor  # [M]: 0 .. P - 1: histories are right-aligned
    occurrences: Tensor  # [M + U]: 4 * row + 1 (the item is input of row) + 2 (it is the target of row - 1)
    history_bits: Tensor  # [W, U + 1]: bit v % 32 of word [v // 32, user]: distinct item v is in the user's history
    whole_offsets: Tensor  # [V + 1]: offsets by the occurrences of all ranks; for one rank `offsets`, like the next two
    encoded_count: Tensor  # its first number is the true number of the next; for one rank `header`
    encoded: Tensor  # [E]: numbers of the items that this rank encodes; for one rank `distinct`

    @classmethod
    def of(cls, buffer: Tensor, shape: StepShape) -> StepBatch:
        """Return the fields of a packed batch as views of its buffer, int32 [shape.starts()[-1]]."""
        parts = zip(shape.fields().items(), shape.starts())
        views = {name: buffer[start : start + math.prod(size)].view(size) for (name, size), start in parts}
        alone = {"whole_offsets": "offsets", "encoded_count": "header", "encoded": "distinct"}
        return cls(**{field: views[name] for field, name in alone.items()} | views)
