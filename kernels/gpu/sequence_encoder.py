"""SASRec in Triton over tiles of packed rows: the step's pair, and the launches that the public op shares with it.

The forward is one launch: gather, position, norm, dropout and all blocks of a tile of rows. The backward's first launch
is its mirror; it leaves the factors of the weights' gradients, which are multiplied over all rows in a fixed number of
splits and added up in order. Nothing is added up by atomics, so results repeat bit for bit.
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
FACTORS, PRODUCTS, ATTENDED = 7, 9, 3  # widths d of the activations and gradients of a row and block


def refusal(weights: SequenceWeights, positions: int) -> str:
    """Return why the kernels do not take an encoder with histories of so many positions, or ""."""
    position, *outer = weights.tensors[:OUTER_WEIGHTS]
    d, blocks = position.shape[1], weights.blocks()
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
    """The states after each row of a batch, from the item vectors, and the gradients of both.

    Attributes: states fp32 [M, d]; state_operands [M, d] in the products' dtype, the same tensor where that is fp32;
    of_inputs fp32 [M, d], the gradient of each row's gathered vector. All are zero where no row stands.
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
        """Args: weights, gradients in fp32 and operands in `dtype`, which `refusal` lets pass, each in views of one
        buffer, one after the other; vectors fp32 [V, d] of the distinct items.
        """
        sizes = EncoderSizes.of(weights, shape.tile_rows, dropout, dtype)
        rows = Rows(batch.header, batch.inputs, batch.row_users, batch.positions, batch.users)
        self._launches = EncoderLaunches(sizes, rows, flat_view(operands.tensors), flat_view(weights.tensors))
        self._vectors, self._of_weights = vectors, flat_view(gradients.tensors)
        self._activations = self._launches.activations()
        self._cotangents, self._parts = self._launches.cotangents(), self._launches.parts()
        self._of_states: Tensor | None = None
        self.states, self.of_inputs = self._launches.empty(shape.rows, sizes.d), self._cotangents.of_inputs
        is_cast = dtype != torch.float32
        self.state_operands = self._launches.empty(shape.rows, sizes.d, dtype=dtype) if is_cast else self.states

    def connect(self, of_states: Tensor) -> None:
        """Let the backward read the gradient of the states, fp32 [M, d], from this tensor."""
        self._of_states = of_states

    def forward(self) -> None:
        """Write the states."""
        self._launches.forward(self._vectors, self.states, self.state_operands, self._activations)

    def backward(self) -> None:
        """Write the gradients of the gathered vectors and of the weights."""
        self._launches.backward(self._of_states, self._activations, self._cotangents)
        self._launches.weight_gradients(self._activations, self._cotangents, self._parts, self._of_weights)


class DropoutRate(NamedTuple):
    """A run's dropout; the hash of seed and step comes with each batch."""

    threshold: int  # of 2^32: hashes below it drop
    scale: float  # of a number that stays


class Rows(NamedTuple):
    """Where the rows of a batch stand: fields of a `StepBatch`."""

    header: Tensor
    inputs: Tensor
    row_users: Tensor
    positions: Tensor
    users: Tensor


class EncoderSizes(NamedTuple):
    """The sizes and constants of an encoder's launches."""

    positions: int
    d: int
    heads: int
    blocks: int
    epsilon: float
    tile_rows: int
    dropout: DropoutRate | None
    dtype: torch.dtype  # of the products

    @classmethod
    def of(
        cls, weights: SequenceWeights, tile_rows: int, dropout: DropoutRate | None, dtype: torch.dtype
    ) -> EncoderSizes:
        """Return the sizes of an encoder with these weights."""
        blocks = len(weights.blocks())
        return cls(*weights.tensors[0].shape, weights.heads, blocks, weights.epsilon, tile_rows, dropout, dtype)

    @property
    def vector(self) -> int:
        """Numbers that a vector [d] takes among the weights."""
        return _aligned(self.d)

    @property
    def outer(self) -> int:
        """Numbers of the positions and the first norm."""
        return _aligned(self.positions * self.d) + 2 * self.vector

    @property
    def weights(self) -> int:
        """Numbers of all weights."""
        return self.outer + self.blocks * (12 * self.d**2 + 4 * self.d + 5 * self.vector)

    @property
    def norms(self) -> int:
        """Norms, one before the blocks and two in each."""
        return 1 + 2 * self.blocks


class Activations(NamedTuple):
    """The forward's results that the backward reads."""

    normed: Tensor  # fp32 [M, norms, d]: before the scales of the norms
    rstd: Tensor  # fp32 [norms, M]
    factors: Tensor  # [blocks, M, 7 d]: what the matrices multiply
    attended: Tensor  # [blocks, M, 3 d]: queries, keys, values


class Cotangents(NamedTuple):
    """The results of the rows' backward from which the gradients of the weights follow."""

    of_inputs: Tensor  # fp32 [M, d]: gradient of the gathered vectors
    products: Tensor  # [blocks, M, 9 d]: gradients of the products with the matrices
    sums: Tensor  # fp32 [tiles, 2 norms, d]: each tile's part of the gradients of the norms


class BlockRange(NamedTuple):
    """The part of one launch: blocks in the order of its direction, or a half of one."""

    first: int
    count: int
    attends: bool
    feeds: bool
    starts: bool  # nothing comes before
    ends: bool  # nothing comes after


class EncoderLaunches:
    """The launches of an encoder over tiles of rows, without memory of their own.

    Weights come one after the other, in the order of `SequenceWeights`.
    """

    def __init__(self, sizes: EncoderSizes, rows: Rows, operands: Tensor, weights: Tensor) -> None:
        """Args: operands, weights: all weights in the products' dtype and in fp32."""
        self._sizes, self._rows, self._weights = sizes, rows, (operands, weights)
        self._device, self._count = rows.inputs.device, len(rows.inputs)
        self._tiles = self._count // sizes.tile_rows
        threshold, self._scale = sizes.dropout or (0, 1.0)
        self._threshold = threshold - (threshold >> 31 << 32)  # a uint32's bits as an int32
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
        """Return new memory."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def activations(self) -> Activations:
        """Return new memory for what the forward leaves."""
        sizes = self._sizes
        return Activations(
            self.empty(self._count, sizes.norms, sizes.d),
            self.empty(sizes.norms, self._count),
            self.empty(sizes.blocks, self._count, FACTORS * sizes.d, dtype=sizes.dtype),
            self.empty(sizes.blocks, self._count, ATTENDED * sizes.d, dtype=sizes.dtype),
        )

    def cotangents(self) -> Cotangents:
        """Return new memory for what the backward of the rows leaves."""
        sizes = self._sizes
        return Cotangents(
            self.empty(self._count, sizes.d),
            self.empty(sizes.blocks, self._count, PRODUCTS * sizes.d, dtype=sizes.dtype),
            self.empty(self._tiles, 2 * sizes.norms, sizes.d),
        )

    def parts(self) -> Tensor:
        """Return new memory for the splits' parts of the weights' gradients, zero between the weights."""
        chosen = self._configuration("sequence_weight_gradients")
        return torch.zeros(chosen.blocks["SPLITS"], self._sizes.weights, device=self._device)

    def forward(self, vectors: Tensor, states: Tensor, state_operands: Tensor, activations: Activations | None) -> None:
        """Write the states of all rows, and the activations if there may be a backward.

        Args: vectors fp32 [V, d]; states fp32 [M, d]; state_operands [M, d] in the products' dtype, or states.
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
        """Write the gradient of the gathered vectors, and what the weights' gradients are computed from.

        Args: of_states fp32 [M, d]; it is not read where no row stands.
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
        """Write the gradients of all weights, fp32, one after the other."""
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
        rows, width = self._count, self._sizes.d
        if width > WIDE or self._sizes.tile_rows > TILE_ROWS[1]:  # no room to load ahead
            rows, width = max(self._count, SMALL_ROWS + 1), WIDE + 1
        return configuration(kernel, rows, self._sizes.dtype, self._device, width)

    def _meta_of_rows(self, blocks: BlockRange, chosen: Configuration) -> dict[str, int | bool | str]:
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
    """Return tensors that are views of one buffer, one after the other, as one view with what lies between them."""
    at = start = tensors[0].storage_offset()
    buffer = tensors[0].untyped_storage().data_ptr()
    for i, tensor in enumerate(tensors):
        if tensor.storage_offset() != at or tensor.untyped_storage().data_ptr() != buffer or not tensor.is_contiguous():
            raise ValueError(f"weights of a sequence encoder: expected views one after the other, tensor {i} is not")
        at += _aligned(tensor.numel())
    return tensors[0].detach().as_strided((at - start,), (1,))


def _aligned(count: int) -> int:
    return -(-count // FLAT_ALIGNMENT) * FLAT_ALIGNMENT


def _block_ranges(blocks: int, by_halves: int, attends_first: bool) -> Iterator[BlockRange]:
    """Yield what each launch computes: all blocks, or a half of one."""
    if not by_halves:
        yield BlockRange(0, blocks, True, True, True, True)
        return
    for half in range(2 * blocks):
        attends = (half % 2 == 0) == attends_first
        yield BlockRange(half // 2, 1, attends, not attends, half == 0, half == 2 * blocks - 1)
