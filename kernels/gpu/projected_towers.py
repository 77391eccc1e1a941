"""The towers of a side network up to item vectors, in Triton: the pair of a training step.

With P the folded projection of a tower, and the other letters of side_towers.py,

    vector = bias + sum over towers of (p_{K-1} P^T + sum over k of a_k projected_up_k),    projected_up_k ~ W_up,k P^T

so no output of width D and no gradient of one is stored. Hidden states are read from the table by row number. Buffers
have the size of the run's bound on items; each kernel reads the true count, and programs beyond it return at once. The
items are divided into splits. Each split writes a part of the gradients, and the parts are added up in a fixed order,
so that results repeat bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from ..types import FIELD_ALIGNMENT, TowerGradients
from . import projected_towers_kernels as projected
from . import side_towers_backward_kernels as backward
from . import side_towers_kernels as forward
from .configurations import SMALL_ROWS, WIDE, Configuration, configuration, only_configuration
from .launch import block, launch, precision
from .side_towers_mix_kernels import mix_gradients

DIMENSIONS = (16, 32, 64, 128)  # widths of an item vector that the kernels take
BOTTLENECKS = (8, 512)  # smallest and largest bottleneck
MOST_TOWERS = 3
MOST_LAYERS = 13
LARGE_TILES_LAYERS, LARGE_TILES_BOTTLENECK = 7, 64  # the largest towers for which large tiles fit


class FoldedOperands(Protocol):
    """The attributes of `FoldHeads` that the pair reads; see the docstring of `FoldHeads`."""

    projection_operands: Tensor
    coefficients: Tensor
    bias: Tensor
    composites: Tensor
    projected_up: Tensor
    vector_bias: Tensor


class ProjectedTowers:
    """The pair: item vectors from hidden states, and the gradients of the fold's results.

    Attributes: vectors fp32 [V, d], 0 beyond the true count; vector_operands, vectors in the products' dtype (the same
    tensor if that is fp32); gradients, a `TowerGradients`. Its of_composites are 0 unless the second layer lies below
    the first. Its of_coefficients have the gates' gradients in place of one coefficient's (see `mix_gradients`).
    """

    def __init__(
        self,
        fold: FoldedOperands,
        down: Sequence[Tensor],
        tables: Sequence[Tensor],
        rows: Tensor,
        header: Tensor,
        views: Sequence[tuple[int, ...]],
        gated: bool,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        """Allocate all memory.

        Args:
            fold: the operands.
            down: the down-projections [K, R, D] of each tower in `dtype`, views of one buffer.
            tables: hidden states [M, K, D] of one or two views, in `dtype`.
            rows: int32 [V], the row number of each item.
            header: int32; its first element is the true number of items.
            views: the indices of the views that each tower reads.
            gated: True if the towers have gates.
            activation: "relu" or "gelu".
            dtype: of the matrix products.

        Raises ValueError for sizes, dtypes and layouts that the kernels do not take.
        """
        self._layers, self._bottleneck, self._width = down[0].shape
        self._towers = len(down)
        self._dim = len(fold.vector_bias)
        reason = refusal(views, self._layers, self._bottleneck, self._width, self._dim)
        if reason or (reason := _unfit(down, tables, dtype)):
            raise ValueError(f"towers by gpu: {reason}")
        self._fold = fold
        self._down = down
        self._rows = rows
        self._header = header
        self._gated = gated
        self._activation = activation
        self._dtype = dtype
        self._items = len(rows)
        self._device = rows.device
        first, second = tables[0], tables[-1]
        self._views = (first, rows, *first.stride()[:2], second, rows, *second.stride()[:2])
        self._shape = {
            "TOWERS": self._towers,
            "K": self._layers,
            "R": self._bottleneck,
            "BR": block(self._bottleneck),
            "PRECISION": precision(dtype),
        }
        readers = [sum(1 << i for i, reads in enumerate(views) if view in reads) for view in (0, 1)]
        self._states = {
            "D": self._width,
            "PACKED": {first.stride(1), second.stride(1)} == {self._width},
            "FIRST_TOWERS": readers[0],
            "SECOND_TOWERS": readers[1],
        }
        self._mix = self._configuration("side_mix_gradients")
        self._mix_programs = triton.cdiv(self._width_chunks(self._mix), self._mix.blocks["CHUNKS"])  # over the width
        self._allocate()

    def _allocate(self) -> None:
        """Allocate outputs, gradients, activations for the backward, and parts of gradients."""
        bottlenecks = (self._towers, self._items, self._layers, self._bottleneck)
        self.vectors = self._empty(self._items, self._dim)
        is_fp32 = self._dtype == torch.float32
        self.vector_operands = self.vectors if is_fp32 else self._empty(*self.vectors.shape, dtype=self._dtype)
        self._of_vectors = self.vectors  # until `connect`
        self._of_operands = self.vectors if is_fp32 else torch.empty_like(self.vector_operands)
        self._out = self._empty(self._towers, self._items, self._dim)
        self._projected = self._empty(*bottlenecks)
        self._activated = self._empty(*bottlenecks, dtype=self._dtype)
        self._inputs = torch.empty_like(self._activated) if self._activation == "gelu" else self._activated
        # dz shares the memory of `projected`, which is not read after the forward
        self._of_inputs = self._projected.view(-1).view(self._dtype)[: math.prod(bottlenecks)].view(bottlenecks)
        sizes = self._gradient_sizes()
        lengths = [-(-math.prod(size) // FIELD_ALIGNMENT) * FIELD_ALIGNMENT for size in sizes.values()]
        self._starts = dict(zip(sizes, itertools.accumulate(lengths, initial=0)))
        self._flat_gradients = self._empty(sum(lengths))
        # zeros, because no program writes the gaps between gradients and the upper triangle of the composites
        self._parts = self._empty(self._splits(), sum(lengths)).zero_()
        views = {
            name: self._flat_gradients[self._starts[name] :][: math.prod(size)].view(size)
            for name, size in sizes.items()
        }
        self.gradients = TowerGradients(of_coefficients=self._empty(self._towers, self._layers, 3), **views)
        tiles = triton.cdiv(self._items, self._mix.blocks["BM"])
        self._mix_parts = self._empty(tiles * self._mix_programs, self.gradients.of_coefficients.numel())

    def _gradient_sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the gradients that lie in one buffer, by name, in the order of the buffer."""
        per_layer = (self._towers, self._layers, self._bottleneck)
        return {
            "of_down": (*per_layer, self._width),
            "of_projections": (self._towers, self._dim, self._width),
            "of_composites": (*per_layer, self._layers, self._bottleneck),
            "of_projected_up": (*per_layer, self._dim),
            "of_bias": per_layer,
            "of_vector_bias": (self._dim,),
        }

    def forward(self) -> None:
        """Launch the item vectors; write vectors and vector_operands."""
        self._project()
        self._recur()
        self._join()

    def connect(self, of_vectors: Tensor) -> None:
        """Set the tensor fp32 [V, d] with the gradient of the vectors; call it before the first backward."""
        self._of_vectors = of_vectors
        if self._dtype == torch.float32:
            self._of_operands = of_vectors

    def backward(self) -> None:
        """Launch the gradients; write `gradients` from the gradient of the vectors."""
        self._recur_backward()
        self._weight_gradients()
        self._hidden_gradients()
        if self._gated:
            self._mix_gradients()
        self._sum_gradients()

    def _project(self) -> None:
        """Launch W_down,k p_k of all layers, and p_{K-1} P^T."""
        chosen = self._configuration("side_project")
        groups = groups_of(self._layers, chosen.blocks["GROUP"])
        self._launch(
            forward.project,
            "side_project",
            (self._tiles(chosen) * self._towers, groups * triton.cdiv(self._bottleneck, self._shape["BR"])),
            chosen,
            *self._views,
            self._fold.coefficients,
            self._down[0],
            self._fold.projection_operands,
            self._projected,
            self._out,
            **self._states,
            COUNTED=True,
            DOWN_PLACES=places(self._down),
            GROUP=triton.cdiv(self._layers, groups),
        )

    def _recur(self) -> None:
        """Launch the bottlenecks, layer by layer, and their part of the vectors."""
        chosen = self._configuration("side_recur")
        self._launch(
            forward.recur,
            "side_recur",
            (self._tiles(chosen) * self._towers,),
            chosen,
            self._projected,
            self._fold.bias,
            self._fold.composites,
            self._fold.projected_up,
            self._inputs,
            self._activated,
            self._out,
            COUNTED=True,
            GELU=self._activation == "gelu",
        )

    def _join(self) -> None:
        """Launch the sum of the towers' parts of the vectors."""
        chosen = only_configuration("side_join", self._device)
        launch(
            projected.join,
            "side_join",
            (self._tiles(chosen),),
            chosen,
            self._out,
            self._fold.vector_bias,
            self.vectors,
            self.vector_operands,
            self._header,
            self._items,
            HEADS=self._dim,
            TOWERS=self._towers,
            **chosen.blocks,
        )

    def _recur_backward(self) -> None:
        """Launch the gradients dz of the bottleneck inputs, and the vectors' gradient in the products' dtype."""
        chosen = self._configuration("side_recur_backward")
        self._launch(
            backward.recur_backward,
            "side_recur_backward",
            (self._tiles(chosen) * self._towers,),
            chosen,
            self._of_vectors,
            self._of_operands,
            self._fold.projected_up,
            self._fold.composites,
            self._inputs,
            self._of_inputs,
            COUNTED=True,
            GELU=self._activation == "gelu",
        )

    def _weight_gradients(self) -> None:
        """Launch the parts of the gradients of the down-projections and of P."""
        chosen = self._configuration("side_weight_gradients")
        groups = groups_of(self._layers, chosen.blocks["GROUP"])
        self._launch(
            backward.weight_gradients,
            "side_weight_gradients",
            (self._width_chunks(chosen) * self._towers, self._weight_rows(chosen), len(self._parts)),
            chosen,
            *self._views,
            self._fold.coefficients,
            self._of_operands,
            0,
            self._dim,
            1,
            self._of_inputs,
            self._activated,
            self._part("of_down"),
            self._part("of_projections"),
            self._parts.shape[1],
            **self._states,
            COUNTED=True,
            DOWN=True,
            UP=False,
            GROUP=triton.cdiv(self._layers, groups),
        )

    def _hidden_gradients(self) -> None:
        """Launch the parts of the gradients that need no hidden states."""
        chosen = self._configuration("side_hidden_gradients")
        blocks = self._layers * triton.cdiv(self._bottleneck, self._shape["BR"])
        launch(
            projected.hidden_gradients,
            "side_hidden_gradients",
            (blocks * blocks, self._towers, len(self._parts)),
            chosen,
            self._of_inputs,
            self._activated,
            self._of_vectors,
            *(self._part(name) for name in ("of_composites", "of_projected_up", "of_bias", "of_vector_bias")),
            self._parts.shape[1],
            self._header,
            self._items,
            HEADS=self._dim,
            **{name: self._shape[name] for name in ("K", "R", "BR", "PRECISION")},
            **chosen.blocks,
        )

    def _mix_gradients(self) -> None:
        """Launch the parts of the gates' gradients."""
        groups = groups_of(self._layers, self._mix.blocks["GROUP"])
        self._launch(
            mix_gradients,
            "side_mix_gradients",
            (self._tiles(self._mix) * self._towers, self._mix_programs),
            self._mix,
            *self._views,
            self._fold.coefficients,
            self._of_operands,
            0,
            self._dim,
            1,
            self._fold.projection_operands,
            self._of_inputs,
            self._down[0],
            self._mix_parts,
            self._mix_parts,
            self._mix_parts,
            **self._states,
            COUNTED=True,
            DOWN_PLACES=places(self._down),
            GATED=True,
            OF_FIRST=False,
            OF_SECOND=False,
            GROUP=triton.cdiv(self._layers, groups),
        )

    def _sum_gradients(self) -> None:
        """Launch the sums of all parts into `gradients`."""
        chosen = only_configuration("side_sum_gradients", self._device)
        splits, total = self._parts.shape
        coefficients = self.gradients.of_coefficients.numel()
        launch(
            projected.sum_gradients,
            "side_sum_gradients",
            (triton.cdiv(total, chosen.blocks["BLOCK"]) + 1,),
            chosen,
            self._parts,
            self._flat_gradients,
            self._mix_parts,
            self.gradients.of_coefficients,
            total,
            self._header,
            self._items,
            S=splits,
            C=coefficients,
            BC=triton.next_power_of_2(coefficients),
            GATED=self._gated,
            TILE=self._mix.blocks["BM"],
            WIDTH_PROGRAMS=self._mix_programs,
            **chosen.blocks,
        )

    def _launch(
        self, kernel: Any, name: str, grid: tuple[int, ...], chosen: Configuration, *arguments: Any, **meta: Any
    ) -> None:
        """Launch a kernel whose last arguments are the header and the bound on items; add the shapes by name."""
        blocks = {size: value for size, value in chosen.blocks.items() if size != "PROGRAMS"}
        names = {"HEADS": self._dim, **self._shape, **blocks} | meta
        launch(kernel, name, grid, chosen, *arguments, self._header, self._items, **names)

    def _configuration(self, kernel: str) -> Configuration:
        """Return a kernel's configuration for the bound on items."""
        rows = rows_of_tiles(self._items, self._layers, self._bottleneck, self._dim)
        return configuration(kernel, rows, self._dtype, self._device)

    def _splits(self) -> int:
        """Return the number of splits of the items; each writes a part of the weight gradients."""
        chosen = self._configuration("side_weight_gradients")
        columns = self._width_chunks(chosen) * self._towers * self._weight_rows(chosen)
        return max(1, min(self._tiles(chosen), chosen.blocks["PROGRAMS"] // columns))

    def _weight_rows(self, chosen: Configuration) -> int:
        """Return the number of programs that divide the rows of a tower's down-projections."""
        groups = groups_of(self._layers, chosen.blocks["GROUP"])
        return groups * triton.cdiv(self._bottleneck, self._shape["BR"])

    def _width_chunks(self, chosen: Configuration) -> int:
        """Return the number of chunks of BD columns of the width."""
        return triton.cdiv(self._width, chosen.blocks["BD"])

    def _tiles(self, chosen: Configuration) -> int:
        """Return the number of tiles of BM items, up to the bound."""
        return triton.cdiv(self._items, chosen.blocks["BM"])

    def _part(self, name: str) -> Tensor:
        """Return the parts of a gradient [splits, elements], a view."""
        start = self._starts[name]
        size = getattr(self.gradients, name).numel()
        return self._parts[:, start : start + size]

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor that is not initialised."""
        return torch.empty(shape, dtype=dtype, device=self._device)


def refusal(views: Sequence[tuple[int, ...]], layers: int, bottleneck: int, width: int, dim: int) -> str:
    """Return why the kernels cannot take towers of these sizes, or ""; dim: width of an item vector."""
    if len(views) > MOST_TOWERS:
        return f"it needs at most {MOST_TOWERS} towers, found {len(views)}"
    if not 1 <= layers <= MOST_LAYERS:
        return f"it needs 1 to {MOST_LAYERS} layers, found {layers}"
    least, most = BOTTLENECKS
    if not least <= bottleneck <= most:
        return f"it needs bottlenecks of {least} to {most}, found {bottleneck}"
    if width % 16:
        return f"it needs widths that are multiples of 16, found {width}"
    if dim not in DIMENSIONS:
        return f"it needs item vectors of {', '.join(map(str, DIMENSIONS))} dimensions, found {dim}"
    return ""


def _unfit(down: Sequence[Tensor], tables: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Return why these down-projections (views of one buffer) and tables, all of `dtype`, do not fit, or ""."""
    if len({weight.untyped_storage().data_ptr() for weight in down}) > 1 or not all(w.is_contiguous() for w in down):
        return "expected down-projections that are contiguous views of one buffer"
    dtypes = {tensor.dtype for tensor in (*down, *tables)}
    if dtypes != {dtype}:
        return f"expected tables and down-projections of {dtype}, found {', '.join(map(str, dtypes))}"
    if any(table.stride(2) != 1 for table in tables):
        return "expected tables whose last dimension is contiguous"
    return ""


def rows_of_tiles(items: int, layers: int, bottleneck: int, dim: int = 0) -> int:
    """Return the number of items to choose a configuration for.

    For large towers it is at most SMALL_ROWS, which chooses small tiles: large tiles would not fit in shared memory.
    """
    is_large = layers > LARGE_TILES_LAYERS or bottleneck > LARGE_TILES_BOTTLENECK or dim > WIDE
    return min(items, SMALL_ROWS) if is_large else items


def groups_of(layers: int, most: int) -> int:
    """Return the number of groups of at most `most` layers; a program holds the layers of one group."""
    return -(-layers // most)


def places(down: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the offset, in elements, of each tower's down-projections from those of the first tower."""
    return tuple(weight.storage_offset() - down[0].storage_offset() for weight in down)
