"""Chains of three linear maps folded on a CPU by C++: `cpp/fold.cpp`, the largest weights' rows shared out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Chain
from ..threads import shares
from .library import DTYPES, PANEL, library, share_out
from .sums import add_up

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
        *((name, ctypes.c_int32) for name in ("start", "count", "outputs", "between", "rows", "width", "stride")),
        *((name, ctypes.c_void_p) for name in Chain._fields),
        *((name, ctypes.c_void_p) for name in ("pair", "constant", "product", "bias", "upstream", "of_bias")),
        *((f"of_{name}", ctypes.c_void_p) for name in Chain._fields),
    ]


class Kept(NamedTuple):
    """What the backward takes from a chain's forward."""

    pair: Tensor  # [H, d]: the outer two's product, transposed
    constant: Tensor  # [d']: what the inner two make of nothing


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        chains, dtype = _chains(weights), weights[0].dtype
        ctx.kept, calls, products, biases = [], [], [], []
        for chain in chains:
            outputs, width = len(chain.outer), chain.inner.shape[1]
            kept = Kept(chain.inner.new_empty(len(chain.inner), outputs), torch.empty_like(chain.middle_bias))
            ctx.kept.append(kept)
            biases.append(chain.outer.new_empty(outputs))
            parts = shares(len(chain.inner), MOST_PARTS)
            products.append([chain.outer.new_empty(outputs, width) for _ in parts])
            for part, product in zip(parts, products[-1]):
                calls.append(arguments(chain, kept, part, product=product, bias=biases[-1]))
        share_out(library(dtype).fold_forward, calls, dtype)
        ctx.save_for_backward(*weights)
        return tuple(each for pair in zip(add_up(products), biases) for each in pair)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, ...]:
        chains, dtype = _chains(ctx.saved_tensors), upstream[0].dtype
        upstream = [each.contiguous() for each in upstream]
        found, calls, of_outer = [], [], []
        for chain, kept, of_weight, of_bias in zip(chains, ctx.kept, upstream[::2], upstream[1::2]):
            found.append([torch.empty_like(weight) for weight in chain[1:]])
            parts = shares(len(chain.inner), MOST_PARTS)
            of_outer.append([torch.empty_like(chain.outer) for _ in parts])
            more = {f"of_{name}": gradient for name, gradient in zip(Chain._fields[1:], found[-1])}
            more |= {"upstream": of_weight, "of_bias": of_bias}
            calls += [arguments(chain, kept, part, of_outer=own, **more) for part, own in zip(parts, of_outer[-1])]
        share_out(library(dtype).fold_backward, calls, dtype)
        return tuple(each for outer, own in zip(add_up(of_outer), found) for each in (outer, *own))


def _chains(weights: Sequence[Tensor]) -> list[Chain]:
    size = len(Chain._fields)
    return [Chain(*weights[i : i + size]) for i in range(0, len(weights), size)]


def arguments(chain: Chain, kept: Kept, part: tuple[int, int], **more: Tensor) -> _Arguments:
    """Of some rows of the inner weight; more: what one direction alone takes."""
    addresses = {name: tensor.data_ptr() for name, tensor in (chain._asdict() | kept._asdict() | more).items()}
    return _Arguments(*part, *chain.outer.shape, *chain.inner.shape, chain.outer.stride(0), **addresses)
