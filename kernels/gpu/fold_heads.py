"""Fold the heads and prepare the towers' operands on a GPU, once a step, and pull the gradients back, as a pair.

With c[k, j] the product of the carries of layers j + 1 .. k of a tower, and P its three last maps folded into one,

    P = outer middle inner                                            [d, D]
    composites[k, j] = c[k, j] W_down,k W_up,j                        [R, R], j < k
    bias[k] = b_down,k + sum over j < k of c[k, j] W_down,k b_up,j    [R]
    projected_up[j] = c[K - 1, j] (P W_up,j)^T                        [R, d]
    vector_bias = fusion bias + sum over towers of (the chain's bias + sum over j of c[K - 1, j] P b_up,j)

so P is treated as one more down-projection, of layer K, whose carry is 1. A forward is two launches and a backward is
two: the second of each waits for the projections, or for their gradients. Each is a list of unlike small tasks, tower
beside tower, so that a whole GPU has work. No program adds to what another wrote: results repeat bit for bit.

Offsets are 32 bits wide: no tensor here has 2^31 elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from ..reference.side_towers import GATE_TEMPERATURE
from ..types import RecommenderWeights, TowerGradients
from .configurations import configuration
from .fold_chains_backward_kernels import fold_chains_backward
from .fold_heads_backward_kernels import fold_backward
from .fold_heads_kernels import fold_chains, fold_prepare
from .launch import Launch, block, launch, precision

MOST_LAYERS = 31
MOST_DIMENSIONS = 128  # of an item vector: a program holds whole columns of a projection


class FoldHeads:
    """The pair: what towers of one shape read, from the flat weights; and the flat weights' gradients.

    Attributes, for T towers of K layers, bottleneck R, width D, embedding dim d: projections fp32 [T, d, D],
    projection_operands in the products' dtype (the same tensor where that is fp32), coefficients fp32 [T, K, 3] (carry,
    first's and second's weight), bias fp32 [T, K, R], composites [T, K, R, K, R] in the products' dtype (zero unless
    the second layer lies below the first), projected_up [T, K, R, d] in the products' dtype, vector_bias fp32 [d].
    """

    def __init__(
        self,
        weights: RecommenderWeights,
        operands: RecommenderWeights,
        gradients: RecommenderWeights,
        dtype: torch.dtype,
    ) -> None:
        """Allocate all memory.

        Args: weights, operands, gradients: views of three flat buffers of one layout: fp32, in the products' dtype
        (the weights themselves where that is fp32), fp32; dtype: of the products, float32 or bfloat16. Raises
        ValueError for weights that the kernels do not take, and for buffers of unlike layouts.
        """
        if reason := refusal(weights):
            raise ValueError(f"fold_heads by gpu: {reason}")
        if dtype not in (torch.float32, torch.bfloat16) or operands.fusion.dtype != dtype:
            found = f"{dtype} with operands of {operands.fusion.dtype}".replace("torch.", "")
            raise ValueError(f"fold_heads by gpu: expected products in float32 or bfloat16, found {found}")
        if len({tensor.untyped_storage().data_ptr() for tensor in _folded_weights(weights)}) > 1:
            raise ValueError("fold_heads by gpu: expected weights that are views of one flat buffer")
        buffers = {"weights": weights, "operands": operands, "gradients": gradients}
        self._tensors = {f"{name}_ptr": flat_buffer(views) for name, views in buffers.items()}
        self._places = places(weights)
        for name, views in buffers.items():
            if places(views) != self._places:
                raise ValueError(f"fold_heads by gpu: expected {name} laid out as the weights are")
        self._dtype = dtype
        self._constants = constants(weights, dtype)
        self._allocate(weights.fusion.device)
        self._forward = [self._task_list(*kernel) for kernel in FORWARD]
        self._backward: list[Launch] = []

    def _allocate(self, device: torch.device) -> None:
        """Allocate the outputs, and what the backward needs beside them."""
        towers, layers, pairs, bottleneck, width, dim, part = (
            self._constants[name] for name in ("TOWERS", "K", "BK", "R", "D", "DIM", "PART")
        )

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def product(*shape: int) -> Tensor:
            return empty(*shape, dtype=self._dtype)

        self.projections = empty(towers, dim, width)
        is_fp32 = self._dtype == torch.float32
        self.projection_operands = self.projections if is_fp32 else product(towers, dim, width)
        self.coefficients = empty(towers, layers, 3)
        self.bias = empty(towers, layers, bottleneck)
        self.composites = product(towers, layers, bottleneck, layers, bottleneck).zero_()
        self.projected_up = product(towers, layers, bottleneck, dim)
        self.vector_bias = empty(dim)
        names = ("projections", "projection_operands", "coefficients", "bias", "composites", "projected_up")
        self._tensors |= {f"{name}_ptr": getattr(self, name) for name in (*names, "vector_bias")}
        self._tensors |= {
            "folded_ptr": product(towers, part, width),
            "folded_bias_ptr": empty(towers, part),
            "carries_ptr": empty(towers, pairs, pairs),
            "total_ptr": product(towers, dim, width),
            "of_folded_ptr": product(towers, part, width),
            "of_folded_bias_ptr": empty(towers, part),
            "through_ptr": empty(towers, pairs, width),
            "dots_ptr": empty(towers, pairs, pairs),
        }

    def connect(self, gradients: TowerGradients) -> None:
        """Take the tensors that the towers' backward writes; to be called once, before the first backward."""
        self._tensors |= {f"{name}_ptr": tensor for name, tensor in gradients._asdict().items()}
        self._backward = [self._task_list(*kernel) for kernel in BACKWARD]

    def forward(self) -> None:
        """Write the attributes from the weights."""
        _run(self._forward)

    def backward(self) -> None:
        """Write the gradients of gates, towers, heads, fusion and its bias from those that the towers gave."""
        _run(self._backward)

    def _task_list(self, kernel: Any, name: str, tasks: Callable[[Mapping[str, Any]], int]) -> Launch:
        """Return the launch of a kernel that goes through a list of tasks for each tower."""
        chosen = configuration(name, 0, self._dtype, self.projections.device)
        names = self._constants | self._places._asdict() | _fitted(chosen.blocks, self._constants)
        arguments = tuple(self._tensors[argument] for argument in kernel.arg_names if argument.endswith("_ptr"))
        meta = {argument: names[argument] for argument in kernel.arg_names if not argument.endswith("_ptr")}
        return Launch(kernel, name, (names["TOWERS"], tasks(names)), chosen, arguments, meta)


class Places(NamedTuple):
    """Where weights start in their flat buffer; a tuple has one place a tower."""

    FUSION: int
    FUSION_BIAS: int
    GATE: tuple[int, ...]
    DOWN: tuple[int, ...]
    DOWN_BIAS: tuple[int, ...]
    UP: tuple[int, ...]
    UP_BIAS: tuple[int, ...]
    MIDDLE: tuple[int, ...]
    MIDDLE_BIAS: tuple[int, ...]
    INNER: tuple[int, ...]
    INNER_BIAS: tuple[int, ...]


def refusal(weights: RecommenderWeights) -> str:
    """Return why the kernels do not take these weights, or an empty string."""
    shapes = {(tower.gate is None, tower.down_weight.shape) for tower in weights.towers}
    if len(shapes) > 1:
        return "it needs towers of one shape, all with gates or none"
    if len(weights.towers[0].down_weight) > MOST_LAYERS:
        return f"it needs at most {MOST_LAYERS} layers, found {len(weights.towers[0].down_weight)}"
    if weights.fusion.dtype != torch.float32:
        return f"it needs weights of float32, found {weights.fusion.dtype}".replace("torch.", "")
    dimensions = max(weights.fusion.shape[0], weights.fusion.shape[1] // len(weights.towers))
    if dimensions > MOST_DIMENSIONS:
        return f"it needs at most {MOST_DIMENSIONS} dimensions of an item vector, found {dimensions}"
    return ""


def flat_buffer(weights: RecommenderWeights) -> Tensor:
    """Return the part of the flat buffer, 1-D, in which the weights of towers and heads lie."""
    start, end = _extent(weights)
    return weights.fusion.detach().as_strided((end - start,), (1,), start)


def places(weights: RecommenderWeights) -> Places:
    """Return where the weights of towers and heads start, in elements, in their `flat_buffer`."""
    start, _ = _extent(weights)

    def place(weight: Tensor | None) -> int:
        return 0 if weight is None else weight.storage_offset() - start

    towers = [tuple(map(place, weights_of_towers)) for weights_of_towers in zip(*(t[1:] for t in weights.towers))]
    heads = [tuple(map(place, weights_of_heads)) for weights_of_heads in zip(*weights.heads)]
    return Places(place(weights.fusion), place(weights.fusion_bias), *towers, *heads)


def constants(weights: RecommenderWeights, dtype: torch.dtype) -> dict[str, Any]:
    """Return the kernels' sizes and flags, by their names there."""
    towers = weights.towers
    layers, bottleneck, width = towers[0].down_weight.shape
    dim, parts = weights.fusion.shape
    hidden = tuple(len(inner) for _, _, inner, _ in weights.heads)
    first, second = (sum(1 << i for i, tower in enumerate(towers) if view in tower.views) for view in (0, 1))
    return {
        "TOWERS": len(towers),
        "K": layers,
        "BK": block(layers + 1),
        "R": bottleneck,
        "D": width,
        "DIM": dim,
        "BDIM": block(dim, MOST_DIMENSIONS),
        "PART": parts // len(towers),
        "BPART": block(parts // len(towers), MOST_DIMENSIONS),
        "HIDDEN": hidden,
        "MOST_HIDDEN": max(hidden),
        "FIRST_TOWERS": first,
        "SECOND_TOWERS": second,
        "GATED": towers[0].gate is not None,
        "TEMPERATURE": GATE_TEMPERATURE,
        "PRECISION": precision(dtype),
    }


def _folded_weights(weights: RecommenderWeights) -> list[Tensor]:
    towers = [weight for tower in weights.towers for weight in tower[1:] if weight is not None]
    return [*towers, *itertools.chain(*weights.heads), weights.fusion, weights.fusion_bias]


def _extent(weights: RecommenderWeights) -> tuple[int, int]:
    """Return where the first of the weights starts in its storage, and where the last ends."""
    tensors = _folded_weights(weights)
    start = min(tensor.storage_offset() for tensor in tensors)
    return start, max(tensor.storage_offset() + tensor.numel() for tensor in tensors)


def _fitted(blocks: Mapping[str, int], sizes: Mapping[str, Any]) -> dict[str, int]:
    """Return a configuration's blocks, none far larger than what it covers."""
    rows = max(sizes["R"], sizes["DIM"], sizes["PART"])
    covered = {"BR": rows, "BC": sizes["R"], "BM": rows, "ROWS": rows, "BD": sizes["D"]}
    hidden = sizes["MOST_HIDDEN"]
    covered |= {"BH": hidden, "BN": max(hidden, sizes["PART"]), "COLUMNS": max(sizes["D"], hidden)}
    return {name: block(covered[name], most) for name, most in blocks.items()}


def _run(launches: Iterable[Launch]) -> None:
    for prepared in launches:
        kernel, name, grid, chosen, arguments, meta = prepared
        launch(kernel, name, grid, chosen, *arguments, **meta)


def _chain_tasks(sizes: Mapping[str, Any]) -> int:
    """Count the gates, rows of the folded biases, columns of the projection."""
    return 1 + cdiv(sizes["PART"], sizes["ROWS"]) + cdiv(sizes["D"], sizes["BD"])


def _prepare_tasks(sizes: Mapping[str, Any]) -> int:
    """Count tiles of each product of two layers, rows of the towers' biases, rows of vector_bias."""
    layers, bottleneck, rows = sizes["K"], sizes["R"], sizes["ROWS"]
    tiles = cdiv(max(bottleneck, sizes["DIM"]), sizes["BR"]) * cdiv(bottleneck, sizes["BC"])
    biases = layers * cdiv(bottleneck, rows) + cdiv(sizes["DIM"], rows)
    return layers * (layers + 1) // 2 * tiles + biases


def _backward_tasks(sizes: Mapping[str, Any]) -> int:
    """Count columns of the projection's gradient, tiles of down and up, columns of biases, dots, outer's bias."""
    layers, columns = sizes["K"], cdiv(sizes["D"], sizes["BD"])
    tiles = layers * cdiv(sizes["R"], sizes["BR"]) * columns
    return columns + 2 * tiles + (layers + 1) * columns + layers * (layers + 1) // 2 + 1


def _chains_backward_tasks(sizes: Mapping[str, Any]) -> int:
    """Count the gates, columns of the up biases, tiles of middle, outer and inner."""
    part, columns = sizes["PART"], cdiv(sizes["D"], sizes["BD"])
    middle = cdiv(part, sizes["BM"]) * cdiv(sizes["MOST_HIDDEN"], sizes["BN"])
    outer = cdiv(sizes["DIM"], sizes["BM"]) * cdiv(part, sizes["BN"])
    return 1 + columns + middle + outer + cdiv(sizes["MOST_HIDDEN"], sizes["BH"]) * columns


FORWARD = ((fold_chains, "fold_chains", _chain_tasks), (fold_prepare, "fold_prepare", _prepare_tasks))
BACKWARD = (
    (fold_backward, "fold_backward", _backward_tasks),
    (fold_chains_backward, "fold_chains_backward", _chains_backward_tasks),
)
