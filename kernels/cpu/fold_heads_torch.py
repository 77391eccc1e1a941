"""Fold chains of three linear maps on a CPU by PyTorch: whole chains side by side, the rest cut by columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import fold_heads as fold_heads_reference
from ..threads import at_once, cores, cut
from ..types import Chain

MOST_WORKERS = 8  # of which each has columns enough for a fast product


def fold_heads(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """Return the reference's weights and biases, differentiable once. Without gradients they are plain products."""
    if not torch.is_grad_enabled():
        return fold_heads_reference.fold_heads(chains)
    weights = ProductsFunction.apply(
        *(weight for chain in chains for weight in (chain.outer, chain.middle, chain.inner))
    )
    return [(weight, fold_heads_reference.folded_bias(chain)) for weight, chain in zip(weights, chains)]


class ChainColumns(NamedTuple):
    """A worker's columns of a chain's product."""

    chain: int
    columns: slice


class ProductsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        chains = _chains(weights)
        products = [outer.new_empty(len(outer), inner.shape[1]) for outer, _, inner in chains]

        def work(pieces: list[ChainColumns]) -> None:
            for chain, columns in pieces:
                outer, middle, inner = chains[chain]
                torch.mm(outer @ middle, inner[:, columns], out=products[chain][:, columns])

        at_once(work, pieces := _pieces(chains), len(pieces))
        ctx.save_for_backward(*weights)
        return tuple(products)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, ...]:
        chains = _chains(ctx.saved_tensors)
        of_inner = [torch.empty_like(inner) for _, _, inner in chains]

        def work(pieces: list[ChainColumns]) -> list[tuple[int, Tensor, Tensor]]:
            parts = []
            for chain, columns in pieces:
                (outer, middle, inner), gradient = chains[chain], upstream[chain][:, columns]
                torch.mm((outer @ middle).T, gradient, out=of_inner[chain][:, columns])
                of_pair = gradient @ inner[:, columns].T
                parts.append((chain, of_pair @ middle.T, outer.T @ of_pair))
            return parts

        totals: list[list[Tensor]] = [[] for _ in chains]
        for chain, *parts in sum(at_once(work, pieces := _pieces(chains), len(pieces)), []):
            totals[chain] = [total + part for total, part in zip(totals[chain], parts)] if totals[chain] else parts
        return tuple(itertools.chain(*((*total, last) for total, last in zip(totals, of_inner))))


def _chains(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tuple(weights[i : i + 3]) for i in range(0, len(weights), 3)]


def _pieces(chains: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[list[ChainColumns]]:
    """Return each worker's share."""
    workers = max(1, min(cores(), MOST_WORKERS))
    whole = len(chains) - len(chains) % workers
    pieces = [[ChainColumns(chain, slice(None)) for chain in range(first, whole, workers)] for first in range(workers)]
    for chain in range(whole, len(chains)):
        for share, (start, length) in zip(pieces, cut(chains[chain][2].shape[1], workers)):
            share.append(ChainColumns(chain, slice(start, start + length)))
    return pieces
