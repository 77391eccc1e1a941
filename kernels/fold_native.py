"""Products of three weights on a CPU by C++: `cpp/fold.cpp`, a share of the largest weight's rows a core."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .fold_host import Chain, chains_of
from .host import shares
from .native import library, share_out

PANEL = 16  # columns
DTYPES = (torch.float32, torch.float64)
MOST_PARTS = 8  # of a chain: each has a product of its own, which are added up


def fold(chains: Sequence[Chain]) -> list[Tensor]:
    """`fold_host.fold` for chains that `takes` accepts."""
    return list(_Fold.apply(*(weight.contiguous() for chain in chains for weight in chain)))


def takes(chains: Sequence[Chain]) -> bool:
    """Whether the C++ knows these weights: of one dtype, their products' rows and columns in whole panels."""
    dtypes = {weight.dtype for chain in chains for weight in chain}
    whole = all(len(outer) % PANEL == 0 and inner.shape[1] % PANEL == 0 for outer, _, inner in chains)
    return len(dtypes) == 1 and dtypes <= set(DTYPES) and whole


class _Arguments(ctypes.Structure):
    """`Fold` of cpp/fold.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("start", "count", "outputs", "between", "rows", "width")),
        *((name, ctypes.c_void_p) for name in ("outer", "middle", "inner", "pair", "product", "upstream")),
        *((name, ctypes.c_void_p) for name in ("of_outer", "of_middle", "of_inner")),
    ]


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        chains = chains_of(weights)
        pairs = [inner.new_empty(len(inner), len(outer)) for outer, _, inner in chains]
        parts, products = [], []
        for (outer, middle, inner), pair in zip(chains, pairs):
            own = [(share, outer.new_empty(len(outer), inner.shape[1])) for share in shares(len(inner), MOST_PARTS)]
            parts += [_arguments(share, outer, middle, inner, pair=pair, product=product) for share, product in own]
            products.append([product for _, product in own])
        share_out(library(weights[0].dtype).fold_forward, parts, weights[0].dtype)
        ctx.save_for_backward(*weights)
        ctx.pairs = pairs
        return tuple(map(_sum, products))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, ...]:
        chains = chains_of(ctx.saved_tensors)
        upstream = [gradient.contiguous() for gradient in upstream]
        of_middle = [torch.empty_like(middle) for _, middle, _ in chains]
        of_inner = [torch.empty_like(inner) for _, _, inner in chains]
        parts, of_outer = [], []
        for i, (outer, middle, inner) in enumerate(chains):
            more = {"pair": ctx.pairs[i], "upstream": upstream[i], "of_middle": of_middle[i], "of_inner": of_inner[i]}
            own = [(share, torch.empty_like(outer)) for share in shares(len(inner), MOST_PARTS)]
            parts += [_arguments(share, outer, middle, inner, of_outer=each, **more) for share, each in own]
            of_outer.append([each for _, each in own])
        share_out(library(upstream[0].dtype).fold_backward, parts, upstream[0].dtype)
        return tuple(each for gradients in zip(map(_sum, of_outer), of_middle, of_inner) for each in gradients)


def _arguments(share: tuple[int, int], outer: Tensor, middle: Tensor, inner: Tensor, **more: Tensor) -> _Arguments:
    sizes = *share, *outer.shape, *inner.shape
    return _Arguments(*sizes, *(weight.data_ptr() for weight in (outer, middle, inner)), **_pointers(more))


def _pointers(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _sum(parts: Iterable[Tensor]) -> Tensor:
    total, *others = parts
    for other in others:
        total += other
    return total
