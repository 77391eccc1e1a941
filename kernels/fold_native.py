"""Chains of three linear maps folded on a CPU by C++: `cpp/fold.cpp`, the largest weights' rows shared out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .host import shares
from .native import library, share_out
from .reference import Chain
from .sums_native import add_up

PANEL = 16  # columns
DTYPES = (torch.float32, torch.float64)
MOST_PARTS = 8  # of a chain: each has a product of its own, which are added up


def fold(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """`reference.fold` of each chain, differentiable once; they are such as `takes` accepts."""
    found = _Fold.apply(*(weight.contiguous() for chain in chains for weight in chain))
    return list(zip(found[::2], found[1::2]))


def takes(chains: Sequence[Chain]) -> bool:
    """Whether the C++ knows these weights: of one dtype, their products' rows and columns in whole panels."""
    dtypes = {weight.dtype for chain in chains for weight in chain}
    whole = all(len(chain.outer) % PANEL == 0 and chain.inner.shape[1] % PANEL == 0 for chain in chains)
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
        chains, dtype = _chains(weights), weights[0].dtype
        ctx.pairs = [chain.inner.new_empty(len(chain.inner), len(chain.outer)) for chain in chains]
        ctx.constants = [torch.addmv(chain.middle_bias, chain.middle, chain.inner_bias) for chain in chains]
        calls, products = [], []
        for chain, pair in zip(chains, ctx.pairs):
            products.append([])
            for share in shares(len(chain.inner), MOST_PARTS):
                product = chain.inner.new_empty(len(chain.outer), chain.inner.shape[1])
                calls.append(_arguments(chain, share, pair=pair, product=product))
                products[-1].append(product)
        share_out(library(dtype).fold_forward, calls, dtype)
        ctx.save_for_backward(*weights)
        biases = [chain.outer.mv(constant) for chain, constant in zip(chains, ctx.constants)]
        return tuple(each for pair in zip(add_up(products), biases) for each in pair)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, ...]:
        chains, dtype = _chains(ctx.saved_tensors), upstream[0].dtype
        of_weights, of_biases = [each.contiguous() for each in upstream[::2]], upstream[1::2]
        found, calls, of_outer = [], [], []
        for chain, pair, of_weight in zip(chains, ctx.pairs, of_weights):
            found.append(Chain(*map(torch.empty_like, chain)))
            of_outer.append([])
            more = {"pair": pair, "upstream": of_weight, "of_middle": found[-1].middle, "of_inner": found[-1].inner}
            for share in shares(len(chain.inner), MOST_PARTS):
                of_outer[-1].append(torch.empty_like(chain.outer))
                calls.append(_arguments(chain, share, of_outer=of_outer[-1][-1], **more))
        share_out(library(dtype).fold_backward, calls, dtype)
        for chain, own, pair, of_bias in zip(chains, found, ctx.pairs, of_biases):
            torch.mv(chain.outer.T, of_bias, out=own.middle_bias)
            torch.mv(pair, of_bias, out=own.inner_bias)
            own.middle.addr_(own.middle_bias, chain.inner_bias)
        of_outer = map(torch.addr, add_up(of_outer), of_biases, ctx.constants)
        return tuple(each for own, outer in zip(found, of_outer) for each in own._replace(outer=outer))


def _chains(weights: Sequence[Tensor]) -> list[Chain]:
    size = len(Chain._fields)
    return [Chain(*weights[i : i + size]) for i in range(0, len(weights), size)]


def _arguments(chain: Chain, share: tuple[int, int], **more: Tensor) -> _Arguments:
    outer, middle, inner = chain.outer, chain.middle, chain.inner
    pointers = {"outer": outer, "middle": middle, "inner": inner, **more}
    addresses = {name: tensor.data_ptr() for name, tensor in pointers.items()}
    return _Arguments(*share, *outer.shape, *inner.shape, **addresses)
