"""Fold the heads and prepare the towers' operands on a GPU, once a step, as a pair with its gradients.

The carry of a layer is the weight of the previous state in its input. With c[k, j] the product of the carries of layers
j + 1 .. k of a tower, and P the product of the three maps that follow the tower,

    P = outer middle inner                                            [d, D]
    composites[k, j] = c[k, j] W_down,k W_up,j                        [R, R], j < k
    bias[k] = b_down,k + sum over j < k of c[k, j] W_down,k b_up,j    [R]
    projected_up[j] = c[K - 1, j] (P W_up,j)^T                        [R, d]
    vector_bias = fusion bias + sum over towers of (the chain's bias + sum over j of c[K - 1, j] P b_up,j)

P acts like the down-projection of one more layer, K, whose carry is 1. The forward is two launches, and so is the
backward; the second launch of each needs the projections, or their gradients. A launch does several kinds of small
tasks for all towers at once, so that it fills the GPU. No program adds to what another wrote, so results repeat bit for
bit.

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
MOST_DIMENSIONS = 128  # width of an item vector: a program holds whole columns of a projection


class FoldHeads:
    """The pair: the forward computes the towers' operands from the flat weights, the backward the weights' gradients.

    Attributes, for T towers of K layers, bottleneck R, width D, and item vectors of width d:
        projections: fp32 [T, d, D].
        projection_operands: projections in the products' dtype; the same tensor if that is fp32.
        coefficients: fp32 [T, K, 3]: carry, weight of the first view, weight of the second view.
        bias: fp32 [T, K, R].
        composites: [T, K, R, K, R] in the products' dtype; 0 unless the second layer lies below the first.
        projected_up: [T, K, R, d] in the products' dtype.
        vector_bias: fp32 [d].
    """

    def __init__(
        self,
        weights: RecommenderWeights,
        operands: RecommenderWeights,
        gradients: RecommenderWeights,
        dtype: torch.dtype,
    ) -> None:
        """Allocate all memory.

        Args:
            weights: fp32, views of one flat buffer.
            operands: the weights in `dtype`; the same tensors if that is fp32.
            gradients: fp32. All three have the same layout in their buffers.
            dtype: of the matrix products, float32 or bfloat16.

        Raises ValueError for weights that the kernels do not take, and if the layouts differ.
        """
        if reason := refusal(weights):
            raise ValueError(f"fold_heads by gpu: {reason}")
        if dtype not in (torch.float32, torch.bfloat16) or operands.fusion.dtype != dtype:
            dtypes = f"{dtype} with operands of {operands.fusion.dtype}".replace("torch.", "")
            raise ValueError(f"fold_heads by gpu: expected products in float32 or bfloat16, found {dtypes}")
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
        """Allocate the outputs and the buffers between launches, and name all tensors as the kernels do."""
        towers, layers, pairs, bottleneck, width, dim, part = (
            self._constants[name] for name in ("TOWERS", "K", "BK", "R", "D", "DIM", "PART")
        )

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            """Return an uninitialised tensor on the device."""
            return torch.empty(shape, dtype=dtype, device=device)

        def product(*shape: int) -> Tensor:
            """Return an uninitialised tensor in the products' dtype."""
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
        """Set the gradients of the outputs, which the towers' backward writes; call it before the first backward."""
        self._tensors |= {f"{name}_ptr": tensor for name, tensor in gradients._asdict().items()}
        self._backward = [self._task_list(*kernel) for kernel in BACKWARD]

    def forward(self) -> None:
        """Launch the fold; write the attributes from the weights."""
        _run(self._forward)

    def backward(self) -> None:
        """Launch the gradients of gates, towers, heads, fusion and its bias, from those given to `connect` before."""
        _run(self._backward)

    def _task_list(self, kernel: Any, name: str, tasks: Callable[[Mapping[str, Any]], int]) -> Launch:
        """Return the launch of a kernel with one program for each tower and task; `tasks` counts the tasks."""
        chosen = configuration(name, 0, self._dtype, self.projections.device)
        names = self._constants | self._places._asdict() | _fitted(chosen.blocks, self._constants)
        arguments = tuple(self._tensors[argument] for argument in kernel.arg_names if argument.endswith("_ptr"))
        meta = {argument: names[argument] for argument in kernel.arg_names if not argument.endswith("_ptr")}
        return Launch(kernel, name, (names["TOWERS"], tasks(names)), chosen, arguments, meta)


class Places(NamedTuple):
    """The offsets of weights in their `flat_buffer`, in elements; a tuple has one for each tower."""

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
    """Return why the kernels cannot fold these weights, or "" if they can."""
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
    """Return the part of the flat buffer, 1-D, from the first to the last weight of towers, heads and fusion."""
    start, end = _extent(weights)
    return weights.fusion.detach().as_strided((end - start,), (1,), start)


def places(weights: RecommenderWeights) -> Places:
    """Return the offsets of the weights of towers, heads and fusion in their `flat_buffer`."""
    start, _ = _extent(weights)

    def place(weight: Tensor | None) -> int:
        """Return a weight's offset in the `flat_buffer`; 0 for no weight."""
        return 0 if weight is None else weight.storage_offset() - start

    towers = [tuple(map(place, weights_of_towers)) for weights_of_towers in zip(*(t[1:] for t in weights.towers))]
    heads = [tuple(map(place, weights_of_heads)) for weights_of_heads in zip(*weights.heads)]
    return Places(place(weights.fusion), place(weights.fusion_bias), *towers, *heads)


def constants(weights: RecommenderWeights, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constexpr sizes and flags of the kernels, by name."""
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
    """Return the weights of towers, heads, fusion and its bias."""
    towers = [weight for tower in weights.towers for weight in tower[1:] if weight is not None]
    return [*towers, *itertools.chain(*weights.heads), weights.fusion, weights.fusion_bias]


def _extent(weights: RecommenderWeights) -> tuple[int, int]:
    """Return (start of the first weight, end of the last) in their storage, in elements."""
    tensors = _folded_weights(weights)
    start = min(tensor.storage_offset() for tensor in tensors)
    return start, max(tensor.storage_offset() + tensor.numel() for tensor in tensors)


def _fitted(blocks: Mapping[str, int], sizes: Mapping[str, Any]) -> dict[str, int]:
    """Return a configuration's tile sizes, reduced where the tensors are smaller than a tile."""
    rows = max(sizes["R"], sizes["DIM"], sizes["PART"])
    covered = {"BR": rows, "BC": sizes["R"], "BM": rows, "ROWS": rows, "BD": sizes["D"]}
    hidden = sizes["MOST_HIDDEN"]
    covered |= {"BH": hidden, "BN": max(hidden, sizes["PART"]), "COLUMNS": max(sizes["D"], hidden)}
    return {name: block(covered[name], most) for name, most in blocks.items()}


def _run(launches: Iterable[Launch]) -> None:
    """Launch prepared launches in order."""
    for prepared in launches:
        kernel, name, grid, chosen, arguments, meta = prepared
        launch(kernel, name, grid, chosen, *arguments, **meta)


def _chain_tasks(sizes: Mapping[str, Any]) -> int:
    """Count the tasks of `fold_chains`: gates, tiles of the folded bias, column tiles of the projection."""
    return 1 + cdiv(sizes["PART"], sizes["ROWS"]) + cdiv(sizes["D"], sizes["BD"])


def _prepare_tasks(sizes: Mapping[str, Any]) -> int:
    """Count the tasks of `fold_prepare`: tiles of each pair of layers, tiles of bias, tiles of vector_bias."""
    layers, bottleneck, rows = sizes["K"], sizes["R"], sizes["ROWS"]
    tiles = cdiv(max(bottleneck, sizes["DIM"]), sizes["BR"]) * cdiv(bottleneck, sizes["BC"])
    biases = layers * cdiv(bottleneck, rows) + cdiv(sizes["DIM"], rows)
    return layers * (layers + 1) // 2 * tiles + biases


def _backward_tasks(sizes: Mapping[str, Any]) -> int:
    """Count the tasks of `fold_backward`.

    They are: column tiles of the projection's gradient, tiles of down and of up, column tiles of the biases' part,
    pairs of layers, and the gradients of middle's and the fusion's biases.
    """
    layers = sizes["K"]
    columns = cdiv(sizes["D"], sizes["BD"])
    tiles = layers * cdiv(sizes["R"], sizes["BR"]) * columns
    return columns + 2 * tiles + (layers + 1) * columns + layers * (layers + 1) // 2 + 1


def _chains_backward_tasks(sizes: Mapping[str, Any]) -> int:
    """Count the tasks of `fold_chains_backward`: gates, tiles of the up biases, middle, outer and inner."""
    part = sizes["PART"]
    columns = cdiv(sizes["D"], sizes["BD"])
    middle = cdiv(part, sizes["BM"]) * cdiv(sizes["MOST_HIDDEN"], sizes["BN"])
    outer = cdiv(sizes["DIM"], sizes["BM"]) * cdiv(part, sizes["BN"])
    return 1 + columns + middle + outer + cdiv(sizes["MOST_HIDDEN"], sizes["BH"]) * columns


FORWARD = ((fold_chains, "fold_chains", _chain_tasks), (fold_prepare, "fold_prepare", _prepare_tasks))
BACKWARD = (
    (fold_backward, "fold_backward", _backward_tasks),
    (fold_chains_backward, "fold_chains_backward", _chains_backward_tasks),
)
