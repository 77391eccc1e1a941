"""Fold chains of three linear maps on a CPU by C++ (`cpp/fold.cpp`), the largest weights' rows shared out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import shares
from ..types import Chain
from .library import DTYPES, PANEL, library, share_out
from .structs import FoldStruct
from .sums import add_up

MOST_PARTS = 8  # of a chain: each has a product of its own, which are added up


def fold_heads(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """Return the reference's weights and biases, differentiable once, of chains that `refusal` does not refuse."""
    folded = FoldFunction.apply(*(weight.contiguous() for chain in chains for weight in chain))
    return list(zip(folded[::2], folded[1::2]))


def refusal(chains: Sequence[Chain]) -> str:
    """Return why C++ does not take these weights, or ""."""
    dtypes = {weight.dtype for chain in chains for weight in chain}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return "it needs weights of one dtype, float32 or float64"
    if any(len(chain.outer) % PANEL or chain.inner.shape[1] % PANEL for chain in chains):
        return f"it needs chains from and to widths that are multiples of {PANEL}"
    return ""


class FoldMemory(NamedTuple):
    """What the backward takes from a chain's forward."""

    pair: Tensor  # [H, d]: the outer two's product, transposed
    constant: Tensor  # [d']: what the inner two make of nothing


class FoldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        chains, dtype = chains_of(weights), weights[0].dtype
        ctx.memory, calls, products, biases = [], [], [], []
        for chain in chains:
            outputs, width = len(chain.outer), chain.inner.shape[1]
            memory = FoldMemory(chain.inner.new_empty(len(chain.inner), outputs), torch.empty_like(chain.middle_bias))
            ctx.memory.append(memory)
            biases.append(chain.outer.new_empty(outputs))
            parts = shares(len(chain.inner), MOST_PARTS)
            products.append([chain.outer.new_empty(outputs, width) for _ in parts])
            for part, product in zip(parts, products[-1]):
                calls.append(fold_struct(chain, memory, part, product=product, bias=biases[-1]))
        share_out(library(dtype).fold_forward, calls, dtype)
        ctx.save_for_backward(*weights)
        return tuple(result for pair in zip(add_up(products), biases) for result in pair)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, ...]:
        chains, dtype = chains_of(ctx.saved_tensors), upstream[0].dtype
        upstream = [gradient.contiguous() for gradient in upstream]
        gradients, calls, of_outer = [], [], []
        for chain, memory, of_weight, of_bias in zip(chains, ctx.memory, upstream[::2], upstream[1::2]):
            gradients.append([torch.empty_like(weight) for weight in chain[1:]])
            parts = shares(len(chain.inner), MOST_PARTS)
            of_outer.append([torch.empty_like(chain.outer) for _ in parts])
            more = {f"of_{name}": gradient for name, gradient in zip(Chain._fields[1:], gradients[-1])}
            more |= {"upstream": of_weight, "of_bias": of_bias}
            calls += [
                fold_struct(chain, memory, part, of_outer=outer, **more) for part, outer in zip(parts, of_outer[-1])
            ]
        share_out(library(dtype).fold_backward, calls, dtype)
        return tuple(itertools.chain(*((outer, *inner) for outer, inner in zip(add_up(of_outer), gradients))))


def chains_of(weights: Sequence[Tensor]) -> list[Chain]:
    """Return the chains whose weights stand in one list."""
    size = len(Chain._fields)
    return [Chain(*weights[i : i + size]) for i in range(0, len(weights), size)]


def fold_struct(chain: Chain, memory: FoldMemory, part: tuple[int, int], **more: Tensor) -> FoldStruct:
    """Return the arguments of the C++ for rows of the inner weight; more: what one direction alone takes."""
    addresses = {name: tensor.data_ptr() for name, tensor in (chain._asdict() | memory._asdict() | more).items()}
    return FoldStruct(*part, *chain.outer.shape, *chain.inner.shape, chain.outer.stride(0), **addresses)
