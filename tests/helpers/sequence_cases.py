"""A sequence encoder with random weights: the pair of the GPU's step and the public op beside the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.kernel_cases import DEVICE, assert_as_good
from helpers.step_batches import pack_batch, step_shape
from iisan_fast import kernels
from iisan_fast.kernels import SequenceGrid, SequenceWeights, sequence_dropout
from iisan_fast.kernels.gpu.sequence_encoder import DropoutRate, SequenceEncoder
from iisan_fast.kernels.reference import sequence_encoder as sequence_encoder_reference
from iisan_fast.kernels.types import StepBatch

EPSILON = 1e-6


def weight_shapes(positions: int, d: int, blocks: int) -> list[tuple[int, ...]]:
    """Return the shapes of an encoder's weights, in the order of `SequenceWeights`."""
    norm = [(d,), (d,)]
    block = [(d, d)] * 4 + norm + [(4 * d, d), (4 * d,), (d, 4 * d), (d,)] + norm
    return [(positions, d), *norm, *block * blocks]


def flat_size(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the size of a flat buffer of weights in which each weight starts at a multiple of 64."""
    return sum(-(-math.prod(shape) // 64) * 64 for shape in shapes)


def views(flat: Tensor, shapes: Sequence[tuple[int, ...]], heads: int) -> SequenceWeights:
    """Return a buffer's numbers as weights, one after the other, each from a multiple of 64 numbers on."""
    starts = [flat_size(shapes[:i]) for i in range(len(shapes))]
    tensors = [flat[start : start + math.prod(shape)].view(shape) for start, shape in zip(starts, shapes)]
    return SequenceWeights(tensors, heads, EPSILON)


class PairCase:
    """A packed batch of users with given numbers of rows, an encoder, and the gradient of the states."""

    def __init__(
        self,
        rows_of_users: Sequence[int],
        d: int = 32,
        heads: int = 2,
        blocks: int = 2,
        dropout: float = 0.25,
        positions: int = 0,
        tile_rows: int = 16,
        spare: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Draw the case. positions, spare: as in `step_shape`."""
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(shape, generator=generator)

        histories = [torch.randint(1, 40, (rows + 1,), generator=generator).tolist() for rows in rows_of_users]
        self.shape = step_shape(histories, positions, tile_rows, spare)
        numbers = torch.randint(0, 2**31, (len(histories),), generator=generator)
        self.dropout = sequence_dropout(dropout, 11, 5, numbers)
        prefix = self.dropout.prefix if self.dropout else 0
        buffer = pack_batch(histories, self.shape, numbers.tolist(), step=5, prefix=prefix)
        self.batch = StepBatch.of(buffer.to(DEVICE), self.shape)
        self.heads = heads
        self.shapes = weight_shapes(self.shape.positions, d, blocks)
        self.flat = random(flat_size(self.shapes), std=0.3)
        self.distinct = len({item for history in histories for item in history})
        self.vectors = random(self.shape.distinct, d)
        self.vectors[self.distinct :] = float("nan")
        self.is_row = self.batch.inputs.cpu() >= 0
        self.of_states = random(self.shape.rows, d)
        self.of_states[~self.is_row] = float("nan")

    def pair(self, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> SequenceEncoder:
        """Return the pair, connected, on operands of a dtype."""
        flat = self.flat.to(device)
        weights, operands, self.gradients = (
            views(buffer, self.shapes, self.heads)
            for buffer in (flat, flat.to(dtype), torch.full_like(flat, torch.nan))
        )
        rate = DropoutRate(self.dropout.threshold, self.dropout.scale) if self.dropout else None
        batch = StepBatch(*(field.to(device) for field in self.batch))
        pair = SequenceEncoder(
            weights, operands, self.gradients, self.vectors.to(device), batch, self.shape, rate, dtype
        )
        pair.connect(self.of_states.to(device))
        return pair

    def run(self) -> dict[str, Tensor]:
        """Return the pair's states, gradient of the rows' vectors, and gradients of the weights, by number."""
        pair = self.pair()
        pair.forward()
        pair.backward()
        gradients = {f"weight {i}": gradient for i, gradient in enumerate(self.gradients.tensors)}
        return {"states": pair.states, "of_inputs": pair.of_inputs, **gradients}

    def reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the reference's results in the pair's layout."""
        length = self.shape.positions
        is_row = self.is_row
        users, inputs = self.batch.row_users.cpu()[is_row].long(), self.batch.inputs.cpu()[is_row].long()
        grid = SequenceGrid(users * length + self.batch.positions.cpu()[is_row], int(users.max()) + 1, length)
        flat = self.flat.to(dtype).requires_grad_()
        x = self.vectors.to(dtype)[inputs].requires_grad_()
        states = sequence_encoder_reference.sequence_encoder(
            x, views(flat, self.shapes, self.heads), grid, self.dropout
        )
        of_x, of_flat = torch.autograd.grad(states, [x, flat], self.of_states[is_row].to(dtype))
        tiles = []
        for values in (states.detach(), of_x):
            tiles.append(torch.zeros(self.shape.rows, values.shape[1], dtype=dtype))
            tiles[-1][is_row] = values
        gradients = views(of_flat, self.shapes, self.heads).tensors
        named = {f"weight {i}": gradient for i, gradient in enumerate(gradients)}
        return {"states": tiles[0], "of_inputs": tiles[1], **named}

    def check(self) -> None:
        """Compare the pair with the reference in fp32 and fp64."""
        exact, theirs = self.reference(torch.float64), self.reference(torch.float32)
        for name, result in self.run().items():
            truth = exact[name]
            error, other = ((values.cpu().double() - truth).norm() for values in (result, theirs[name]))
            assert error <= max(8 * other, 4e-6 * truth.norm()), f"{name}: {error:.2e}, {other:.2e} by the reference"
        assert not result.isnan().any()


class GridCase:
    """Histories of given lengths on a grid of users and positions, weights, and the gradient of the states."""

    def __init__(
        self,
        lengths: Sequence[int],
        d: int = 32,
        heads: int = 2,
        blocks: int = 1,
        dropout: float = 0.25,
        spare: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw the case. spare: number of the encoder's positions that the grid lacks."""
        generator = torch.Generator().manual_seed(9)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)

        length = max(lengths, default=1)
        slots = [length * (user + 1) - inputs + i for user, inputs in enumerate(lengths) for i in range(inputs)]
        self.grid = SequenceGrid(torch.tensor(slots, dtype=torch.int64, device=DEVICE), len(lengths), length)
        self.heads = heads
        self.dtype = dtype
        self.tensors = [random(*shape, std=0.3) for shape in weight_shapes(length + spare, d, blocks)]
        self.x = random(len(slots), d)
        self.gradient = random(len(slots), d)
        users = torch.randint(0, 2**31, (len(lengths),), generator=generator).to(DEVICE)
        self.dropout = sequence_dropout(dropout, 3, 17, users)

    def run(self, op: Callable, dtype: torch.dtype | None = None, wanted: Sequence[int] | None = None) -> list[Tensor]:
        """Return the states, then the gradients of x and the weights, or of those numbered in `wanted`."""
        dtype = dtype or self.dtype
        leaves = [tensor.detach().to(dtype).clone() for tensor in (self.x, *self.tensors)]
        chosen = [leaves[i].requires_grad_() for i in (range(len(leaves)) if wanted is None else wanted)]
        x, *tensors = leaves
        states = op(x, SequenceWeights(tensors, self.heads, EPSILON), self.grid, self.dropout)
        return [states.detach(), *torch.autograd.grad(states, chosen, self.gradient.to(dtype))]

    def check(self, wanted: Sequence[int] | None = None) -> None:
        """Compare Triton with the reference in the case's precision and in fp64."""
        ours = self.run(sequence_by_gpu, wanted=wanted)
        reference = sequence_encoder_reference.sequence_encoder
        theirs, exact = (self.run(reference, dtype, wanted) for dtype in (None, torch.float64))
        assert_as_good(theirs, ours, exact, self.dtype)


def sequence_by_gpu(*arguments: Any) -> Tensor:
    """Return the states by Triton."""
    return kernels.sequence_encoder(*arguments, form="gpu")
