"""Fold chains of three linear maps on a CPU in C++ (`cpp/fold.cpp`); the cores divide the rows of `inner`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import shares
from ..types import Chain, RecommenderWeights
from .library import DTYPES, PANEL, library
from .schedule import AT_ONCE, Span, share_out
from .step_calls import StepCalls, addresses
from .structs import FoldStruct
from .sums import add_up

MOST_PARTS = 8  # parts of a chain's rows; each part writes a whole product, and the products are added up


def fold_heads(chains: Sequence[Chain]) -> list[tuple[Tensor, Tensor]]:
    """Return the folded weight [d, D] and bias [d] of each chain, differentiable once; `refusal` must return ""."""
    folded = FoldFunction.apply(*(weight.contiguous() for chain in chains for weight in chain))
    return list(zip(folded[::2], folded[1::2]))


def refusal(chains: Sequence[Chain]) -> str:
    """Return why the C++ cannot fold these chains, or "" if it can."""
    dtypes = {weight.dtype for chain in chains for weight in chain}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return "it needs weights of one dtype, float32 or float64"
    if any(len(chain.outer) % PANEL or chain.inner.shape[1] % PANEL for chain in chains):
        return f"it needs chains from and to widths that are multiples of {PANEL}"
    return ""


class FoldMemory(NamedTuple):
    """Results of a chain's forward that its backward reads."""

    pair: Tensor  # [H, d]: (outer middle) transposed
    constant: Tensor  # [d']: middle inner_bias + middle_bias


class FoldFunction(torch.autograd.Function):
    """The autograd function of `fold_heads`."""

    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return weight and bias of each chain, one after the other, from the chains' weights in one list."""
        chains = chains_of(weights)
        dtype = weights[0].dtype
        ctx.memory = []
        calls = []
        products = []
        biases = []
        for chain in chains:
            outputs = len(chain.outer)
            width = chain.inner.shape[1]
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
        """Return the gradients of all weights from those of the results."""
        chains = chains_of(ctx.saved_tensors)
        dtype = upstream[0].dtype
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
    """Split a list of weights into chains, five weights each."""
    size = len(Chain._fields)
    return [Chain(*weights[i : i + size]) for i in range(0, len(weights), size)]


def fold_struct(chain: Chain, memory: FoldMemory, part: tuple[int, int], **more: Tensor) -> FoldStruct:
    """Return a C++ call on a part of the rows of `inner`.

    Args:
        chain: its weights; all but `outer` are contiguous.
        memory: written by the forward, read by the backward.
        part: (start, length) of the rows.
        more: fields of `FoldStruct` that only the forward or only the backward uses, with their tensors.
    """
    addresses = {name: tensor.data_ptr() for name, tensor in (chain._asdict() | memory._asdict() | more).items()}
    return FoldStruct(*part, *chain.outer.shape, *chain.inner.shape, chain.outer.stride(0), **addresses)


class FoldHeadsCalls:
    """The op as a pair of a step: it folds each tower's heads and its part of the fusion into one projection.

    Attributes: projections, for each tower [d, D]; biases [towers, d].
    """

    def __init__(self, calls: StepCalls, weights: RecommenderWeights, gradients: RecommenderWeights) -> None:
        """Allocate the memory and prepare the calls."""
        chains = weights.chains()
        d = len(weights.fusion)
        parts = [shares(len(chain.inner), MOST_PARTS) for chain in chains]
        self._calls = calls
        self.done = AT_ONCE
        self._memory = [
            FoldMemory(calls.empty(len(chain.inner), d), calls.empty(len(chain.middle))) for chain in chains
        ]
        self._products = [[calls.empty(d, chain.inner.shape[1]) for _ in cuts] for chain, cuts in zip(chains, parts)]
        self.biases = calls.empty(len(chains), d)
        # Zeros, since chains with fewer parts leave their columns of the last parts unwritten.
        more = torch.zeros(max(map(len, parts)) - 1, *weights.fusion.shape, dtype=calls.dtype, device="cpu")
        self._of_fusion = [gradients.fusion, *more]
        outer = list(zip(*(part.chunk(len(chains), dim=1) for part in self._of_fusion)))  # [tower][part]
        self._folds = [
            [self._fold(i, chain, part, number, outer[i][number], gradients) for number, part in enumerate(parts[i])]
            for i, chain in enumerate(chains)
        ]

    @property
    def projections(self) -> list[Tensor]:
        """Return each tower's projection [d, D]."""
        return [products[0] for products in self._products]

    def connect(self, of_projections: Sequence[Tensor], add_up: Callable[[], Iterator[tuple[int, Span]]]) -> None:
        """Set the tensors that hold the projections' gradients, one [d, D] for each tower.

        add_up: schedules the sums of their parts; it yields each tower and the calls that complete its gradient.
        """
        self._add_up = add_up
        for folds, upstream in zip(self._folds, of_projections, strict=True):
            for fold in folds:
                fold.upstream = upstream.data_ptr()

    def forward(self) -> None:
        """Schedule the products of each tower's chain."""
        spans = []
        for folds, products in zip(self._folds, self._products):
            spans.append(self._calls.add("fold_forward", folds))
            spans.append(self._calls.add_sums(addresses(products), products[0].numel(), spans[-1]))
        self.done = spans[0].to(spans[-1])

    def backward(self) -> None:
        """Schedule the gradients of the heads and of the fusion, tower by tower, as `add_up` yields them."""
        spans = [self._calls.add("fold_backward", self._folds[tower], summed) for tower, summed in self._add_up()]
        self._calls.add_sums(addresses(self._of_fusion), self._of_fusion[0].numel(), spans[0].to(spans[-1]))

    def _fold(
        self,
        tower: int,
        chain: Chain,
        part: tuple[int, int],
        number: int,
        of_outer: Tensor,
        gradients: RecommenderWeights,
    ) -> FoldStruct:
        """Return a call for part `number` of a tower's chain; its part of the outer map's gradient goes to of_outer."""
        results = {"product": self._products[tower][number], "bias": self.biases[tower]}
        of_inner = dict(zip((f"of_{name}" for name in Chain._fields[1:]), gradients.heads[tower]))
        more = {**results, **of_inner, "of_outer": of_outer, "of_bias": gradients.fusion_bias}
        return fold_struct(chain, self._memory[tower], part, **more)
