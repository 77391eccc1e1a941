"""Heads folded into one map on a CPU, by C++ and by the reference: products, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compiler import needs_compiler
from iisan_fast import kernels
from iisan_fast.kernels.cpu import fold_heads as fold_heads_cpu
from iisan_fast.kernels.reference import fold_heads as fold_heads_reference


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(64, 64, 768, 768), (16, 5, 37, 32), (32, 7, 1, 16), (16, 3, 200, 48)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_folding_in_cpp_is_the_products_and_their_gradients(dtype, tolerance, sizes, threads):
    torch.set_num_threads(threads)
    chains, upstream = random_chains(sizes, dtype)
    weights = [weight for chain in chains for weight in chain]
    assert not fold_heads_cpu.refusal(chains)
    actual = [result for pair in kernels.fold_heads(chains, form="cpu") for result in pair]
    expected = [result for pair in fold_heads_reference.fold_heads(chains) for result in pair]
    assert isinstance(actual[0].grad_fn, fold_heads_cpu.FoldFunction._backward_cls)
    ours, theirs = ([*result, *torch.autograd.grad(result, weights, upstream)] for result in (actual, expected))
    for value, other in zip(ours, theirs, strict=True):
        assert (value - other).norm() <= tolerance * other.norm()


def random_chains(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[kernels.Chain], list[Tensor]]:
    """Return two chains whose outer maps are halves of one matrix, and gradients of their weights and biases.

    sizes: d, d', H, D. One gradient is not contiguous and one has stride 0.
    """
    generator = torch.Generator().manual_seed(0)
    (d, between, rows, width) = sizes

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    chains = [
        kernels.Chain(outer, random(between, rows), random(between), random(rows, width), random(rows))
        for outer in random(d, 2 * between).chunk(2, dim=1)
    ]
    for chain in chains:
        for weight in chain:
            weight.requires_grad_()
    return chains, [random(d, width), random(d), random(width, d).T, random(1).expand(d)]


@needs_compiler
def test_folding_in_cpp_passes_gradcheck():
    chains, _ = random_chains((16, 2, 3, 16), torch.float64)
    weights = [weight for chain in chains for weight in chain]

    def fold(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            result for pair in kernels.fold_heads(fold_heads_cpu.chains_of(weights), form="cpu") for result in pair
        )

    assert torch.autograd.gradcheck(fold, weights)


@pytest.mark.parametrize("columns", [1, 2, 7, 17, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("form", ["auto", "reference"])
def test_fold_is_the_product_and_its_gradients_are_right(columns, count, form):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for hidden in range(2, 2 + count)
        for shape in ((3, 4), (4, hidden), (4,), (hidden, columns), (hidden,))
    ]
    x = torch.randn(6, columns, generator=generator, dtype=torch.float64)

    def fold(*weights):
        return [result for pair in kernels.fold_heads(fold_heads_cpu.chains_of(weights), form) for result in pair]

    for (weight, bias), chain in zip(
        kernels.fold_heads(fold_heads_cpu.chains_of(weights), form), fold_heads_cpu.chains_of(weights)
    ):
        outer, middle, middle_bias, inner, inner_bias = chain
        expected = F.linear(F.linear(F.linear(x, inner, inner_bias), middle, middle_bias), outer)
        torch.testing.assert_close(F.linear(x, weight, bias), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *weights: tuple(fold(*weights)), weights)
    with torch.inference_mode():
        assert torch.equal(fold(*weights)[-2], weights[-5] @ weights[-4] @ weights[-2])


def test_fold_refuses_shapes_that_cannot_be_multiplied():
    def chain(rows: int, constants: int) -> kernels.Chain:
        return kernels.Chain(
            torch.ones(2, 3), torch.ones(3, 5), torch.ones(3), torch.ones(rows, 2), torch.ones(constants)
        )

    for bad, message in (
        (chain(4, 4), "chains[1]: expected matrices that can be multiplied, found [[2, 3], [3, 5], [4, 2]]"),
        (chain(5, 4), "chains[1].inner_bias: expected [5], found [4]"),
    ):
        with pytest.raises(ValueError) as refused:
            kernels.fold_heads([chain(5, 5), bad])
        assert str(refused.value) == message
