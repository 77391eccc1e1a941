"""A packed batch with random states and vectors: the loss's pairs of the GPU's step beside the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.kernel_cases import DEVICE
from helpers.step_batches import pack_batch, step_shape
from iisan_fast.kernels.gpu.inbatch_cross_entropy import InbatchCrossEntropy
from iisan_fast.kernels.gpu.item_vector_gradients import ItemVectorGradients
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference
from iisan_fast.kernels.types import HEADER, StepBatch


class LossPairCase:
    """A packed batch of users with given numbers of rows, random states, vectors, and gradients of inputs."""

    def __init__(
        self,
        rows_of_users: Sequence[int],
        items: int = 40,
        d: int = 32,
        tile_rows: int = 16,
        spare: tuple[int, int, int] = (1, 1, 1),
        scale: float = 1.0,
    ) -> None:
        """Draw the case. items: size of the catalogue; spare: as in `step_shape`; scale: factor of the states."""
        generator = torch.Generator().manual_seed(3)
        histories = [torch.randint(1, items + 1, (rows + 1,), generator=generator).tolist() for rows in rows_of_users]
        self.shape = step_shape(histories, 0, tile_rows, spare)
        self.batch = StepBatch.of(pack_batch(histories, self.shape), self.shape)
        header = dict(zip(HEADER, self.batch.header.tolist()))
        self.distinct = header["distinct"]
        true_rows = header["tiles"] * tile_rows
        self.is_row = self.batch.inputs >= 0
        assert int(self.is_row.sum()) == header["rows"]
        self.states, self.vectors, self.of_inputs = (
            torch.randn(size, d, generator=generator)
            for size in (self.shape.rows, self.shape.distinct, self.shape.rows)
        )
        self.states *= scale
        self.states[true_rows:] = float("nan")
        self.vectors[self.distinct :] = float("nan")
        self.of_inputs[~self.is_row] = float("nan")
        self.log2_p = torch.zeros(self.shape.distinct)
        self.log2_p[: self.distinct] = torch.rand(self.distinct, generator=generator).log2()
        self.bias = self.batch.offsets.diff().float().log2() - self.log2_p

    def pairs(
        self, dtype: torch.dtype = torch.float32, device: str = DEVICE
    ) -> tuple[InbatchCrossEntropy, ItemVectorGradients]:
        """Return both pairs on operands of a dtype."""
        batch = StepBatch(*(field.to(device) for field in self.batch))
        states, vectors = self.states.to(device, dtype), self.vectors.to(device, dtype)
        bias, log2_p = self.bias.to(device), self.log2_p.to(device)
        loss = InbatchCrossEntropy(states, vectors, batch, bias, log2_p, self.shape, dtype)
        return loss, ItemVectorGradients(loss, self.of_inputs.to(device))

    def run(self, pairs: tuple[InbatchCrossEntropy, ItemVectorGradients] | None = None) -> dict[str, Tensor]:
        """Return the losses, the gradient of the states in the batch's tiles, and that of the vectors."""
        loss, collect = self.pairs() if pairs is None else pairs
        loss.forward()
        loss.backward()
        collect.backward()
        tiles = int(self.batch.header[HEADER.index("tiles")]) * self.shape.tile_rows
        results = {"losses": loss.losses, "of_states": loss.of_states[:tiles], "of_vectors": collect.of_vectors}
        return {name: result.cpu().clone() for name, result in results.items()}

    def reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the reference's results in the pairs' layout, by autograd."""
        is_row = self.is_row
        vectors = self.vectors[: self.distinct].to(dtype).requires_grad_()
        states = self.states[is_row].to(dtype).requires_grad_()
        log_2 = torch.tensor(2.0, dtype=dtype).log()
        log2_m = self.batch.offsets.diff()[: self.distinct].to(dtype).log2()
        losses = loss_reference.inbatch_cross_entropy(
            states,
            vectors,
            self.batch.targets[is_row].long(),
            self.batch.row_users[is_row].long(),
            self.batch.history_bits[:, : self.shape.users].T,
            log2_m * log_2,
            self.log2_p[: self.distinct].to(dtype) * log_2,
        )
        read = vectors[self.batch.inputs[is_row].long()]
        total = losses.mean() + (read * self.of_inputs[is_row].to(dtype)).sum()
        of_states, of_vectors = torch.autograd.grad(total, [states, vectors])
        results = {
            "losses": torch.zeros(self.shape.rows, dtype=dtype),
            "of_states": torch.zeros(
                int(self.batch.header[2]) * self.shape.tile_rows, self.states.shape[1], dtype=dtype
            ),
            "of_vectors": torch.zeros(self.vectors.shape, dtype=dtype),
        }
        results["losses"][is_row] = losses.detach()
        results["of_states"][is_row[: len(results["of_states"])]] = of_states
        results["of_vectors"][: self.distinct] = of_vectors
        return results

    def check(self) -> None:
        """Compare the pairs with the reference in fp32 and fp64; results of padding must be exactly 0."""
        exact, theirs = self.reference(torch.float64), self.reference(torch.float32)
        for name, result in self.run().items():
            truth = exact[name]
            assert result.shape == truth.shape and not result[truth == 0].any(), name
            error, other = ((values.double() - truth).norm() for values in (result, theirs[name]))
            assert error <= max(8 * other, 4e-6 * truth.norm()), f"{name}: {error:.2e}, {other:.2e} by the reference"
