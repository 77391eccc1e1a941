"""SASRec in Triton over tiles of packed rows: the pair of a training step, and launches that the public op shares.

The forward is one launch: a program gathers a tile of rows and computes positions, norm, dropout and all blocks. The
backward's first launch goes back through a tile and stores the two factors of each weight's gradient. The second launch
multiplies them over all rows, in a fixed number of splits, and the third adds up the splits. There are no atomics, so
results repeat bit for bit. A configuration with HALVES launches each half of a block apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..types import FLAT_ALIGNMENT, OUTER_WEIGHTS, TILE_ROWS, SequenceWeights, StepBatch, StepShape
from . import sequence_encoder_backward_kernels as backward_kernels
from . import sequence_encoder_kernels as forward_kernels
from .configurations import SMALL_ROWS, WIDE, Configuration, configuration
from .launch import launch, precision
from .part_sums import sum_parts

WIDTHS = (32, 64, 128)
MOST_HEADS, LEAST_HEAD_WIDTH = 8, 8
FACTORS, PRODUCTS, ATTENDED = 7, 9, 3  # numbers stored for a row and block, in multiples of d


def refusal(weights: SequenceWeights, positions: int) -> str:
    """Return why the kernels cannot take an encoder and histories of `positions` items, or "" if they can."""
    position, *outer = weights.tensors[:OUTER_WEIGHTS]
    d = position.shape[1]
    blocks = weights.blocks()
    longest = max(positions, len(position))
    if d not in WIDTHS:
        return f"it needs an embedding dimension of {', '.join(map(str, WIDTHS))}, found {d}"
    if weights.heads > MOST_HEADS or d // weights.heads < LEAST_HEAD_WIDTH:
        return f"it needs 1 to {MOST_HEADS} heads of at least {LEAST_HEAD_WIDTH}, found {weights.heads} over {d}"
    if longest > TILE_ROWS[-1]:
        return f"it needs at most {TILE_ROWS[-1]} positions, found {longest}"
    square, vector, wide = (d, d), (d,), (4 * d, d)
    of_block = [square, square, square, square, vector, vector, wide, wide[:1], wide[::-1], vector, vector, vector]
    if not blocks or any([weight.shape for weight in block] != of_block for block in blocks):
        return f"it needs blocks with a feed-forward of {4 * d}"
    if any(weight.shape != vector for weight in outer):
        return "it needs norms as wide as the positions"
    return ""


class SequenceEncoder:
    """The pair: hidden states of a packed batch from the item vectors, and the gradients of vectors and weights.

    Attributes: states fp32 [M, d]; state_operands, states in the products' dtype (the same tensor if that is fp32);
    of_inputs fp32 [M, d], the gradient of the item vector that each row reads. All are 0 for padding rows.
    """

    def __init__(
        self,
        weights: SequenceWeights,
        operands: SequenceWeights,
        gradients: SequenceWeights,
        vectors: Tensor,
        batch: StepBatch,
        shape: StepShape,
        dropout: DropoutRate | None,
        dtype: torch.dtype,
    ) -> None:
        """Allocate all memory.

        Args:
            weights: fp32, for which `refusal` returns "".
            operands: the weights in `dtype`.
            gradients: fp32. The tensors of each of the three are views of one buffer, one after the other.
            vectors: fp32 [V, d], the vectors of the distinct items.
            batch: the packed batch; shape: its sizes.
            dropout: None for none.
            dtype: of the matrix products.

        Raises ValueError if weights are not views of one buffer, one after the other.
        """
        sizes = EncoderSizes.of(weights, shape.tile_rows, dropout, dtype)
        rows = Rows(batch.header, batch.inputs, batch.row_users, batch.positions, batch.users)
        self._launches = EncoderLaunches(sizes, rows, flat_view(operands.tensors), flat_view(weights.tensors))
        self._vectors = vectors
        self._of_weights = flat_view(gradients.tensors)
        self._activations = self._launches.activations()
        self._cotangents = self._launches.cotangents()
        self._parts = self._launches.parts()
        self._of_states: Tensor | None = None
        self.states = self._launches.empty(shape.rows, sizes.d)
        self.of_inputs = self._cotangents.of_inputs
        is_cast = dtype != torch.float32
        self.state_operands = self._launches.empty(shape.rows, sizes.d, dtype=dtype) if is_cast else self.states

    def connect(self, of_states: Tensor) -> None:
        """Set the tensor fp32 [M, d] from which the backward reads the gradient of the states."""
        self._of_states = of_states

    def forward(self) -> None:
        """Launch the states; write states and state_operands."""
        self._launches.forward(self._vectors, self.states, self.state_operands, self._activations)

    def backward(self) -> None:
        """Launch the gradients; write of_inputs and the gradients of the weights."""
        self._launches.backward(self._of_states, self._activations, self._cotangents)
        self._launches.weight_gradients(self._activations, self._cotangents, self._parts, self._of_weights)


class DropoutRate(NamedTuple):
    """The dropout of a run; the hash of seed and step is in each batch's header."""

    threshold: int  # a number is dropped if its 32-bit hash is below this
    scale: float  # factor of the numbers that are not dropped


class Rows(NamedTuple):
    """The fields of a `StepBatch` that describe its rows."""

    header: Tensor
    inputs: Tensor
    row_users: Tensor
    positions: Tensor
    users: Tensor


class EncoderSizes(NamedTuple):
    """The sizes and constants of an encoder's launches."""

    positions: int  # that the model has
    d: int
    heads: int
    blocks: int
    epsilon: float
    tile_rows: int
    dropout: DropoutRate | None
    dtype: torch.dtype  # of the matrix products

    @classmethod
    def of(
        cls, weights: SequenceWeights, tile_rows: int, dropout: DropoutRate | None, dtype: torch.dtype
    ) -> EncoderSizes:
        """Return the sizes of an encoder with these weights."""
        blocks = len(weights.blocks())
        return cls(*weights.tensors[0].shape, weights.heads, blocks, weights.epsilon, tile_rows, dropout, dtype)

    @property
    def vector(self) -> int:
        """Return how many numbers a vector [d] takes in the flat weights, with its alignment."""
        return _aligned(self.d)

    @property
    def outer(self) -> int:
        """Return how many numbers the positions and the first norm take in the flat weights."""
        return _aligned(self.positions * self.d) + 2 * self.vector

    @property
    def weights(self) -> int:
        """Return how many numbers all weights take, with their alignment."""
        return self.outer + self.blocks * (12 * self.d**2 + 4 * self.d + 5 * self.vector)

    @property
    def norms(self) -> int:
        """Return the number of layer norms: one before the blocks and two in each."""
        return 1 + 2 * self.blocks


class Activations(NamedTuple):
    """The forward's results that the backward reads."""

    normed: Tensor  # fp32 [M, norms, d]: normalised rows, before scale and shift
    rstd: Tensor  # fp32 [norms, M]: 1 / standard deviation of each row
    factors: Tensor  # [blocks, M, 7 d]: the inputs of a block's matrices
    attended: Tensor  # [blocks, M, 3 d]: queries, keys, values


class Cotangents(NamedTuple):
    """The results of the backward's first launch, from which the second computes the weights' gradients."""

    of_inputs: Tensor  # fp32 [M, d]: gradient of the item vector that each row reads
    products: Tensor  # [blocks, M, 9 d]: gradients of the outputs of a block's matrices
    sums: Tensor  # fp32 [tiles, 2 norms, d]: each tile's part of the gradients of the norms' scales and shifts


class BlockRange(NamedTuple):
    """The blocks, or the half of a block, that one launch computes."""

    first: int  # first block, counted in the order of the direction: from the last block in the backward
    count: int  # number of blocks
    attends: bool  # computes the attention half
    feeds: bool  # computes the feed-forward half
    starts: bool  # is the first launch
    ends: bool  # is the last launch


class EncoderLaunches:
    """The launches of an encoder over tiles of rows; the caller passes all memory.

    Flat weights are one tensor with all weights in the order of `SequenceWeights`, aligned to `FLAT_ALIGNMENT`.
    """

    def __init__(self, sizes: EncoderSizes, rows: Rows, operands: Tensor, weights: Tensor) -> None:
        """Set the constants of all launches; operands, weights: the flat weights in the products' dtype and in fp32."""
        self._sizes = sizes
        self._rows = rows
        self._weights = (operands, weights)
        self._device = rows.inputs.device
        self._count = len(rows.inputs)
        self._tiles = self._count // sizes.tile_rows
        threshold, self._scale = sizes.dropout or (0, 1.0)
        self._threshold = threshold - (threshold >> 31 << 32)  # the int32 with the bits of this uint32
        self._meta = {
            "P": sizes.positions,
            "OUTER": sizes.outer,
            "V": sizes.vector,
            "D": sizes.d,
            "BLOCKS": sizes.blocks,
            "BM": sizes.tile_rows,
            "PRECISION": precision(sizes.dtype),
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised tensor on the rows' device."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def activations(self) -> Activations:
        """Return uninitialised memory for the forward's activations."""
        sizes = self._sizes
        return Activations(
            self.empty(self._count, sizes.norms, sizes.d),
            self.empty(sizes.norms, self._count),
            self.empty(sizes.blocks, self._count, FACTORS * sizes.d, dtype=sizes.dtype),
            self.empty(sizes.blocks, self._count, ATTENDED * sizes.d, dtype=sizes.dtype),
        )

    def cotangents(self) -> Cotangents:
        """Return uninitialised memory for the results of the backward's first launch."""
        sizes = self._sizes
        return Cotangents(
            self.empty(self._count, sizes.d),
            self.empty(sizes.blocks, self._count, PRODUCTS * sizes.d, dtype=sizes.dtype),
            self.empty(self._tiles, 2 * sizes.norms, sizes.d),
        )

    def parts(self) -> Tensor:
        """Return memory [splits, all weights] for the splits' parts of the weights' gradients, 0 between weights."""
        chosen = self._configuration("sequence_weight_gradients")
        return torch.zeros(chosen.blocks["SPLITS"], self._sizes.weights, device=self._device)

    def forward(self, vectors: Tensor, states: Tensor, state_operands: Tensor, activations: Activations | None) -> None:
        """Launch the states of all rows.

        Args:
            vectors: fp32 [V, d]; a row reads the vector with the number of its input.
            states: fp32 [M, d], written.
            state_operands: [M, d] in the products' dtype, written; or `states` itself.
            activations: written, for a backward; None if none follows.
        """
        chosen = self._configuration("sequence_forward")
        for blocks in _block_ranges(self._sizes.blocks, chosen.blocks["HALVES"], attends_first=True):
            launch(
                forward_kernels.forward,
                "sequence_forward",
                (self._tiles,),
                chosen,
                vectors,
                *self._rows,
                *self._weights,
                states,
                state_operands,
                *(activations or (states,) * len(Activations._fields)),
                self._count,
                blocks.first,
                self._threshold,
                self._scale,
                EPSILON=self._sizes.epsilon,
                STORE=activations is not None,
                CAST=state_operands is not states,
                START=blocks.starts,
                **self._meta_of_rows(blocks, chosen),
            )

    def backward(self, of_states: Tensor, activations: Activations, cotangents: Cotangents) -> None:
        """Launch the backward through the rows; write `cotangents`.

        of_states fp32 [M, d]: the gradient of the states, not read for padding rows.
        """
        chosen = self._configuration("sequence_backward")
        for blocks in _block_ranges(self._sizes.blocks, chosen.blocks["HALVES"], attends_first=False):
            launch(
                backward_kernels.backward,
                "sequence_backward",
                (self._tiles,),
                chosen,
                of_states if blocks.starts else cotangents.of_inputs,
                *self._rows,
                *self._weights,
                *activations,
                cotangents.products,
                cotangents.of_inputs,
                cotangents.sums,
                self._count,
                blocks.first,
                self._threshold,
                self._scale,
                END=blocks.ends,
                **self._meta_of_rows(blocks, chosen),
            )

    def weight_gradients(
        self, activations: Activations, cotangents: Cotangents, parts: Tensor, of_weights: Tensor
    ) -> None:
        """Launch the weights' gradients into `of_weights`, fp32, laid out like the weights; parts: of `parts()`."""
        chosen = self._configuration("sequence_weight_gradients")
        columns = min(self._sizes.d, chosen.blocks["BN"])
        products = 12 * (self._sizes.d // columns) * self._sizes.blocks
        launch(
            backward_kernels.weight_gradients,
            "sequence_weight_gradients",
            (products + 1 + 2 * self._sizes.norms, len(parts)),
            chosen,
            self._rows.header,
            self._rows.positions,
            cotangents.of_inputs,
            activations.factors,
            cotangents.products,
            cotangents.sums,
            parts,
            self._count,
            BP=max(16, triton.next_power_of_2(self._sizes.positions)),
            BN=columns,
            BK=chosen.blocks["BK"],
            **self._meta,
        )
        sum_parts(parts, of_weights)

    def _configuration(self, kernel: str) -> Configuration:
        """Return a kernel's configuration for these rows and this width."""
        rows = self._count
        width = self._sizes.d
        if width > WIDE or self._sizes.tile_rows > TILE_ROWS[1]:  # no shared memory for a pipeline
            rows = max(self._count, SMALL_ROWS + 1)
            width = WIDE + 1
        return configuration(kernel, rows, self._sizes.dtype, self._device, width)

    def _meta_of_rows(self, blocks: BlockRange, chosen: Configuration) -> dict[str, int | bool | str]:
        """Return the constexpr arguments of the launches over tiles of rows."""
        heads = self._sizes.heads
        return {
            **self._meta,
            "HEADS": heads,
            "DROP": self._sizes.dropout is not None,
            "COUNT": blocks.count,
            "ATTEND": blocks.attends,
            "FEED": blocks.feeds,
            "GROUP": min(heads, max(1, chosen.blocks["STACK"] // self._sizes.tile_rows)),
            "FC": chosen.blocks["FC"],
        }


def flat_view(tensors: list[Tensor]) -> Tensor:
    """Return one 1-D view over tensors that are views of one buffer, one after the other, gaps included.

    Each tensor starts at the next multiple of `FLAT_ALIGNMENT`. Raises ValueError if one does not.
    """
    at = start = tensors[0].storage_offset()
    buffer = tensors[0].untyped_storage().data_ptr()
    for i, tensor in enumerate(tensors):
        if tensor.storage_offset() != at or tensor.untyped_storage().data_ptr() != buffer or not tensor.is_contiguous():
            raise ValueError(f"weights of a sequence encoder: expected views one after the other, tensor {i} is not")
        at += _aligned(tensor.numel())
    return tensors[0].detach().as_strided((at - start,), (1,))


def _aligned(count: int) -> int:
    """Return a count rounded up to a multiple of `FLAT_ALIGNMENT`."""
    return -(-count // FLAT_ALIGNMENT) * FLAT_ALIGNMENT


def _block_ranges(blocks: int, by_halves: int, attends_first: bool) -> Iterator[BlockRange]:
    """Yield the part of each launch: all blocks in one, or with by_halves each half of each block.

    attends_first: True in the forward, where attention comes before the feed-forward; False in the backward.
    """
    if not by_halves:
        yield BlockRange(0, blocks, True, True, True, True)
        return
    for half in range(2 * blocks):
        attends = (half % 2 == 0) == attends_first
        yield BlockRange(half // 2, 1, attends, not attends, half == 0, half == 2 * blocks - 1)
