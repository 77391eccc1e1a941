"""The towers of a side network up to item vectors, in Triton: a pair of launches for a step's forward and backward.

With P the map that follows a tower, folded into one, and in the terms of side_towers.py,

    vector = bias + sum over towers of (p_{K-1} P^T + sum over k of a_k projected_up_k),    projected_up_k ~ W_up,k P^T

so neither an output of width D nor its gradient exists. The states are read where they lie, by row number. A buffer has
room for the run's bound on items; every kernel reads the true count and leaves at once beyond it. Parts of gradients
are written by split and added up in one order, so that results repeat bit for bit.
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

DIMENSIONS = (16, 32, 64, 128)  # of an item vector
BOTTLENECKS = (8, 512)  # least and most
MOST_TOWERS = 3
MOST_LAYERS = 13
LARGE_TILES_LAYERS, LARGE_TILES_BOTTLENECK = 7, 64  # the most that the configurations of large tiles are for


class FoldedOperands(Protocol):
    """The results of `FoldHeads` that the pair reads; its docstring describes them."""

    projection_operands: Tensor
    coefficients: Tensor
    bias: Tensor
    composites: Tensor
    projected_up: Tensor
    vector_bias: Tensor


class ProjectedTowers:
    """The pair: item vectors from the states, and the gradients of what was folded.

    Attributes: vectors fp32 [V, d] and vector_operands in the products' dtype (the same tensor where that is fp32), 0
    beyond the true count; gradients, a `TowerGradients` of views of one buffer. Its of_coefficients are such that the
    gates' gradients follow from them (kernel `mix_gradients`), its of_composites are 0 unless the second layer lies
    below the first.
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

        Args: fold: the operands; down: each tower's down-projections [K, R, D] in the products' dtype, views of one
        buffer; tables: one or two [M, K, D] in the products' dtype; rows int32 [V]: of the tables; header int32: its
        first element is the true number of rows; views: those that each tower reads; gated: whether the towers have
        gates; activation: "relu" or "gelu"; dtype: of the products. Raises ValueError for what the kernels do not take.
        """
        self._layers, self._bottleneck, self._width = down[0].shape
        self._towers, self._dim = len(down), len(fold.vector_bias)
        reason = refusal(views, self._layers, self._bottleneck, self._width, self._dim)
        if reason or (reason := _unfit(down, tables, dtype)):
            raise ValueError(f"towers by gpu: {reason}")
        self._fold, self._down, self._rows, self._header = fold, down, rows, header
        self._gated, self._activation, self._dtype = gated, activation, dtype
        self._items, self._device = len(rows), rows.device
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
        self._mix_programs = triton.cdiv(self._width_chunks(self._mix), self._mix.blocks["CHUNKS"])  # of the width
        self._allocate()

    def _allocate(self) -> None:
        """Allocate outputs, gradients, what the backward needs of the forward, and parts of gradients."""
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
        # dz is written when the projected states have been read
        self._of_inputs = self._projected.view(-1).view(self._dtype)[: math.prod(bottlenecks)].view(bottlenecks)
        sizes = self._gradient_sizes()
        lengths = [-(-math.prod(size) // FIELD_ALIGNMENT) * FIELD_ALIGNMENT for size in sizes.values()]
        self._starts = dict(zip(sizes, itertools.accumulate(lengths, initial=0)))
        self._flat_gradients = self._empty(sum(lengths))
        # no program writes the upper triangle of the composites', nor what aligns: those stay 0
        self._parts = self._empty(self._splits(), sum(lengths)).zero_()
        views = {
            name: self._flat_gradients[self._starts[name] :][: math.prod(size)].view(size)
            for name, size in sizes.items()
        }
        self.gradients = TowerGradients(of_coefficients=self._empty(self._towers, self._layers, 3), **views)
        tiles = triton.cdiv(self._items, self._mix.blocks["BM"])
        self._mix_parts = self._empty(tiles * self._mix_programs, self.gradients.of_coefficients.numel())

    def _gradient_sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the gradients whose parts lie beside one another, by their names."""
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
        """Write the vectors of the items that are there."""
        self._project()
        self._recur()
        self._join()

    def connect(self, of_vectors: Tensor) -> None:
        """Take the gradient of the vectors, fp32 [V, d]; to be called once, before the first backward."""
        self._of_vectors = of_vectors
        if self._dtype == torch.float32:
            self._of_operands = of_vectors

    def backward(self) -> None:
        """Write the gradients from that of the vectors."""
        self._recur_backward()
        self._weight_gradients()
        self._hidden_gradients()
        if self._gated:
            self._mix_gradients()
        self._sum_gradients()

    def _project(self) -> None:
        """W_down,k p_k of every layer, and p_{K-1} P^T."""
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
        """The bottlenecks of each layer from those below it, and their part of the vectors."""
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
        """The towers' parts of the vectors, added up."""
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
        """The gradient of every bottleneck input, and the vectors' gradient in the products' dtype."""
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
        """Parts of the gradients of the down-projections and of P."""
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
        """Parts of the gradients that need no states."""
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
        """Parts of the gates' gradients."""
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
        """The gradients, from their parts."""
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
        """Launch a kernel that takes the true count last and the shapes by name."""
        blocks = {size: value for size, value in chosen.blocks.items() if size != "PROGRAMS"}
        names = {"HEADS": self._dim, **self._shape, **blocks} | meta
        launch(kernel, name, grid, chosen, *arguments, self._header, self._items, **names)

    def _configuration(self, kernel: str) -> Configuration:
        rows = rows_of_tiles(self._items, self._layers, self._bottleneck, self._dim)
        return configuration(kernel, rows, self._dtype, self._device)

    def _splits(self) -> int:
        """Return into how many splits of the items the weight gradients are divided."""
        chosen = self._configuration("side_weight_gradients")
        columns = self._width_chunks(chosen) * self._towers * self._weight_rows(chosen)
        return max(1, min(self._tiles(chosen), chosen.blocks["PROGRAMS"] // columns))

    def _weight_rows(self, chosen: Configuration) -> int:
        """Return how many programs share the rows of a tower's down-projections."""
        groups = groups_of(self._layers, chosen.blocks["GROUP"])
        return groups * triton.cdiv(self._bottleneck, self._shape["BR"])

    def _width_chunks(self, chosen: Configuration) -> int:
        return triton.cdiv(self._width, chosen.blocks["BD"])

    def _tiles(self, chosen: Configuration) -> int:
        return triton.cdiv(self._items, chosen.blocks["BM"])

    def _part(self, name: str) -> Tensor:
        """Return the parts of a gradient [splits, elements], a view."""
        start, size = self._starts[name], getattr(self.gradients, name).numel()
        return self._parts[:, start : start + size]

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor that is not initialised."""
        return torch.empty(shape, dtype=dtype, device=self._device)


def refusal(views: Sequence[tuple[int, ...]], layers: int, bottleneck: int, width: int, dim: int) -> str:
    """Return why the kernels do not take towers of these sizes, or an empty string."""
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
    """Return what is wrong with the tensors, or an empty string."""
    if len({weight.untyped_storage().data_ptr() for weight in down}) > 1 or not all(w.is_contiguous() for w in down):
        return "expected down-projections that are contiguous views of one buffer"
    found = {tensor.dtype for tensor in (*down, *tables)}
    if found != {dtype}:
        return f"expected tables and down-projections of {dtype}, found {', '.join(map(str, found))}"
    if any(table.stride(2) != 1 for table in tables):
        return "expected tables whose last dimension is contiguous"
    return ""


def rows_of_tiles(items: int, layers: int, bottleneck: int, dim: int = 0) -> int:
    """Return for how many items a configuration is chosen. Large tiles of larger towers overfill the shared memory."""
    is_large = layers > LARGE_TILES_LAYERS or bottleneck > LARGE_TILES_BOTTLENECK or dim > WIDE
    return min(items, SMALL_ROWS) if is_large else items


def groups_of(layers: int, most: int) -> int:
    """Return into how many groups of at most `most` layers a kernel that holds a group at once divides them."""
    return -(-layers // most)


def places(down: Sequence[Tensor]) -> tuple[int, ...]:
    """Return how far each tower's down-projections lie from the first tower's, in elements."""
    return tuple(weight.storage_offset() - down[0].storage_offset() for weight in down)
