"""A sequence encoder with random weights over a packed batch: the pair of the GPU's step beside the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.kernel_cases import DEVICE
from helpers.step_batches import pack_batch, step_shape
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


def views(flat: Tensor, shapes: Sequence[tuple[int, ...]], heads: int) -> SequenceWeights:
    """Return a buffer's numbers as weights, one after the other."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return SequenceWeights([part.view(shape) for part, shape in zip(parts, shapes)], heads, EPSILON)


class PairCase:
    """Users with so many rows each in tiles, an encoder, and the gradient of the states."""

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
        """positions, spare: as of `step_shape`."""
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
        self.heads, self.shapes = heads, weight_shapes(self.shape.positions, d, blocks)
        self.flat = torch.cat([random(*shape, std=0.3).flatten() for shape in self.shapes])
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
        length, is_row = self.shape.positions, self.is_row
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
