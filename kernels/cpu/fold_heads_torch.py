"""Chains of three linear maps folded on a CPU: whole chains side by side, what is left cut by columns, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Chain, folded_bias
from ..threads import at_once, cores, cut

MOST_WORKERS = 8  # of which each has columns enough for a fast product


def fold(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """`reference.fold` of each chain, differentiable once."""
    weights = _Fold.apply(*(weight for chain in chains for weight in (chain.outer, chain.middle, chain.inner)))
    return [(weight, folded_bias(chain)) for weight, chain in zip(weights, chains)]


class _Piece(NamedTuple):
    """Some columns of a chain's product."""

    chain: int
    columns: slice


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        chains = _chains(weights)
        products = [outer.new_empty(len(outer), inner.shape[1]) for outer, _, inner in chains]

        def work(pieces: list[_Piece]) -> None:
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

        def work(pieces: list[_Piece]) -> list[tuple[int, Tensor, Tensor]]:
            found = []
            for chain, columns in pieces:
                (outer, middle, inner), gradient = chains[chain], upstream[chain][:, columns]
                torch.mm((outer @ middle).T, gradient, out=of_inner[chain][:, columns])
                of_pair = gradient @ inner[:, columns].T
                found.append((chain, of_pair @ middle.T, outer.T @ of_pair))
            return found

        totals: list[list[Tensor]] = [[] for _ in chains]
        for chain, *parts in sum(at_once(work, pieces := _pieces(chains), len(pieces)), []):
            totals[chain] = [total + part for total, part in zip(totals[chain], parts)] if totals[chain] else parts
        return tuple(each for total, last in zip(totals, of_inner) for each in (*total, last))


def _chains(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tuple(weights[i : i + 3]) for i in range(0, len(weights), 3)]


def _pieces(chains: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[list[_Piece]]:
    """Each worker's share."""
    workers = max(1, min(cores(), MOST_WORKERS))
    whole = len(chains) - len(chains) % workers
    found = [[_Piece(chain, slice(None)) for chain in range(worker, whole, workers)] for worker in range(workers)]
    for chain in range(whole, len(chains)):
        for own, (start, length) in zip(found, cut(chains[chain][2].shape[1], workers)):
            own.append(_Piece(chain, slice(start, start + length)))
    return found
