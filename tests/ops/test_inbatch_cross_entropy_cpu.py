"""The in-batch loss by C++ against the reference, losses and gradients, in fp64 and fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.compiler import needs_compiler
from iisan_fast import kernels
from iisan_fast.kernels.cpu import inbatch_cross_entropy as loss_cpu
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference

pytestmark = [
    needs_compiler,
    pytest.mark.usefixtures("two_threads_and_nan_in_new_memory"),
]


class Case:
    """Queries of users, and the items in each user's history; each row's target is in its user's history."""

    def __init__(self, rows, items, width=16, masked=True, counted=True, debiased=True, seed=0) -> None:
        random = np.random.default_rng(seed)
        users = max(1, rows // 4)
        in_history = random.random((users, -(-items // 32) * 32)) < 0.2
        in_history[:, items:] = False
        self.queries, self.items = (torch.from_numpy(random.normal(size=(n, width))) for n in (rows, items))
        self.targets = torch.from_numpy(random.integers(0, items, rows))
        self.row_users = torch.from_numpy(np.sort(random.integers(0, users, rows)))
        in_history[self.row_users.numpy(), self.targets.numpy()] = True
        bits = torch.from_numpy(np.packbits(in_history, axis=1, bitorder="little").view("<i4").copy())
        self.upstream = torch.from_numpy(random.normal(size=rows))
        self.keywords: dict[str, Any] = {"row_users": self.row_users, "history_bits": bits} if masked else {}
        if counted:
            self.keywords["log_multiplicity"] = torch.from_numpy(random.integers(1, 5, items)).double().log()
        if debiased:
            self.keywords["log_popularity"] = torch.from_numpy(random.uniform(0.01, 1, items)).log()

    def run(self, op, dtype: torch.dtype) -> list[Tensor]:
        queries, items = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (self.queries, self.items))
        keywords = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.keywords.items()}
        losses = op(queries, items, self.targets, **keywords)
        return [losses.detach(), *torch.autograd.grad(losses, (queries, items), self.upstream.to(dtype))]

    def check(self) -> None:
        exact = self.run(loss_reference.inbatch_cross_entropy, torch.float64)
        for actual, truth in zip(self.run(by_cpu, torch.float64), exact):
            torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-12)
        ours, theirs = (self.run(op, torch.float32) for op in (by_cpu, loss_reference.inbatch_cross_entropy))
        for actual, other, truth in zip(ours, theirs, exact):
            error = (actual - truth).norm().item()
            allowed = 8 * (other - truth).norm().item()
            assert error <= max(allowed, 4e-6 * max(1, truth.norm().item()))


def by_cpu(*arguments, **keywords) -> Tensor:
    return kernels.inbatch_cross_entropy(*arguments, **keywords, reduction="none", form="cpu")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 1, 3, 31, 32, 63, 65]),
    st.sampled_from([1, 2, 16, 31, 32, 33, 64, 100]),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 2, 3, 8]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_rows(rows, items, width, threads, masked, counted, debiased, seed):
    torch.set_num_threads(threads)
    Case(rows, items, width, masked, counted, debiased, seed).check()


def test_real_sizes():
    Case(305, 276, 64).check()


def test_gradients_equal_finite_differences():
    case = Case(5, 7)
    leaves = [tensor.clone().requires_grad_() for tensor in (case.queries, case.items)]
    assert torch.autograd.gradcheck(lambda *tensors: by_cpu(*tensors, case.targets, **case.keywords), leaves)


def test_it_repeats_to_the_last_bit():
    case = Case(70, 90)
    first, second = (case.run(by_cpu, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_expanded_gradient_and_one_side_alone():
    case = Case(40, 50)
    queries = case.queries.clone().requires_grad_()
    by_cpu(queries, case.items, case.targets, **case.keywords).sum().backward()
    other = case.queries.clone().requires_grad_()
    loss_reference.inbatch_cross_entropy(other, case.items, case.targets, **case.keywords).sum().backward()
    torch.testing.assert_close(queries.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_lost(value):
    case = Case(40, 50, masked=False)
    case.queries[3, 2] = value
    losses = case.run(by_cpu, torch.float32)[0]
    assert not losses[3].isfinite() and losses[4:].isfinite().all()


def test_calls_that_it_refuses_run_by_the_reference(monkeypatch):
    monkeypatch.delenv(kernels.FORM_VARIABLE, raising=False)
    monkeypatch.setattr(loss_cpu, "inbatch_cross_entropy", lambda *_: pytest.fail("C++ ran"))
    narrow, case = Case(9, 8, width=5), Case(9, 8)
    losses = kernels.inbatch_cross_entropy(narrow.queries, narrow.items, narrow.targets, reduction="none")
    assert torch.equal(losses, loss_reference.inbatch_cross_entropy(narrow.queries, narrow.items, narrow.targets))
    popularity = case.keywords["log_popularity"].requires_grad_()
    kernels.inbatch_cross_entropy(case.queries, case.items, case.targets, **case.keywords).backward()
    assert popularity.grad is not None


@pytest.mark.parametrize(
    ("width", "trained", "reason"),
    [
        (5, False, "it needs a width that is a multiple of 16, found 5"),
        (16, True, "it has no gradient for log_multiplicity and log_popularity"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(width, trained, reason):
    case = Case(9, 8, width=width)
    case.keywords["log_popularity"].requires_grad_(trained)
    with pytest.raises(ValueError, match=f"form: cpu cannot run inbatch_cross_entropy: {reason}; use reference"):
        by_cpu(case.queries, case.items, case.targets, **case.keywords)


@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (2, 1)])
def test_threads_may_change_before_a_backward_that_runs_twice(forward, backward):
    case = Case(70, 90)
    exact = case.run(loss_reference.inbatch_cross_entropy, torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (case.queries, case.items)]
    torch.set_num_threads(forward)
    losses = by_cpu(*leaves, case.targets, **case.keywords)
    torch.set_num_threads(backward)
    for last in (False, True):
        gradients = torch.autograd.grad(losses, leaves, case.upstream, retain_graph=not last)
        for gradient, truth in zip(gradients, exact[1:]):
            torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)
