"""The comparison of benchmarks/loss_in_bfloat16.py: products are rounded, doubles are not, and three forms train."""

from __future__ import annotations

import torch

from iisan_fast import kernels
from iisan_fast.benchmarks import loss_in_bfloat16 as comparison


def products(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a product of random factors, and the gradients of both."""
    generator = torch.Generator().manual_seed(0)
    first, second, upstream = (torch.randn(5, 5, dtype=dtype, generator=generator) for _ in range(3))
    first.requires_grad_()
    second.requires_grad_()
    product = first @ second
    return [product.detach(), *torch.autograd.grad(product, (first, second), upstream)]


def test_factors_are_rounded_in_forward_and_backward():
    exact = products(torch.float32)
    with comparison.RoundedProducts():
        rounded, doubles = products(torch.float32), products(torch.float64)
    generator = torch.Generator().manual_seed(0)
    first, second, upstream = (torch.randn(5, 5, generator=generator).bfloat16().float() for _ in range(3))
    assert all(map(torch.equal, rounded, (first @ second, upstream @ second.T, first.T @ upstream)))
    assert not any(map(torch.equal, rounded, exact))
    assert all(map(torch.equal, doubles, products(torch.float64)))


def test_three_forms_train_and_differ_by_rounding(toy_run, monkeypatch):
    dataset, cache = toy_run
    monkeypatch.setattr(comparison, "VIEW", "title")
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    result = comparison.compare(dataset, cache, seeds=[0], steps=3)
    (figures,) = result["seeds"]
    assert len(figures["float32_losses"]) == 3
    for name in (comparison.EXCEPT_LOSS, comparison.BFLOAT16):
        assert 0 < result["largest_difference"][name] < 0.05
        assert len(figures["differences"][name]["by_step"]) == 3
    by_step = [figures["differences"][name]["by_step"] for name in (comparison.EXCEPT_LOSS, comparison.BFLOAT16)]
    assert by_step[0] != by_step[1]
