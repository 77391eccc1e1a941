"""Fold the heads and prepare the towers' operands on a GPU, once a step, and pull the gradients back, as a pair.

With c[k, j] the product of the carries of layers j + 1 .. k of a tower, and P its three last maps folded into one,

    P = outer middle inner                                            [d, D]
    composites[k, j] = c[k, j] W_down,k W_up,j                        [R, R], j < k
    bias[k] = b_down,k + sum over j < k of c[k, j] W_down,k b_up,j    [R]
    projected_up[j] = c[K - 1, j] (P W_up,j)^T                        [R, d]
    vector_bias = fusion bias + sum over towers of (the chain's bias + sum over j of c[K - 1, j] P b_up,j)

so P is treated as one more down-projection, of layer K, whose carry is 1. The weights lie in one flat buffer; the
kernels take the buffer, and where each tower's weights start in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import RecommenderWeights

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
        views_of_towers: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        """Allocate all memory.

        Args: weights, operands, gradients: views of three flat buffers of one layout: fp32, in the products' dtype
        (the weights themselves where that is fp32), fp32; dtype: of the products, float32 or bfloat16.
        """
        if reason := refusal(weights):
            raise ValueError(f"fold_heads by gpu: {reason}")
        layers, bottleneck, width = weights.towers[0].down_weight.shape
        towers, dim = len(weights.towers), weights.fusion.shape[0]
        device = weights.fusion.device

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.projections = empty(towers, dim, width)
        is_fp32 = dtype == torch.float32
        self.projection_operands = self.projections if is_fp32 else empty(towers, dim, width, dtype=dtype)
        self.coefficients = empty(towers, layers, 3)
        self.bias = empty(towers, layers, bottleneck)
        shape = (towers, layers, bottleneck, layers, bottleneck)
        self.composites = torch.zeros(shape, dtype=dtype, device=device)
        self.projected_up = empty(towers, layers, bottleneck, dim, dtype=dtype)
        self.vector_bias = empty(dim)


def refusal(weights: RecommenderWeights) -> str:
    """Return why the kernels do not take these weights, or an empty string."""
    shapes = {(tower.gate is None, tower.down_weight.shape) for tower in weights.towers}
    if len(shapes) > 1:
        return "towers have unlike shapes, or gates in part"
    hidden = weights.fusion.shape[1] // len(weights.towers)
    if max(weights.fusion.shape[0], hidden) > MOST_DIMENSIONS:
        return f"item vectors have at most {MOST_DIMENSIONS} dimensions, found {weights.fusion.shape[0]}"
    return ""
