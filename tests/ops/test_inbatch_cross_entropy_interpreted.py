"""The loss in Triton against the reference: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.kernel_cases import (
    DEVICE,
    UNSHRUNK,
    LossCase,
    loss_by_gpu,
    relative_error,
    strided,
)
from iisan_fast import kernels
from iisan_fast.kernels.gpu import launch
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_in_new_memory")]


def test_small_gradients_of_the_loss_do_not_underflow_in_fp16():
    case = LossCase(30, 50, dtype=torch.float16)
    large, small = (
        torch.autograd.grad(loss_by_gpu(case.queries, leaf, **case.keywords), leaf, case.gradient * scale)[0]
        for scale in (1.0, 1 / 256)
        for leaf in [case.items.clone().requires_grad_()]
    )
    assert relative_error(256 * small.float(), large.double()) < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("masked", "counted", "debiased"), list(itertools.product([True, False], repeat=3)))
def test_loss_in_all_its_forms(masked, counted, debiased, dtype):
    LossCase(37, 83, masked=masked, counted=counted, debiased=debiased, dtype=dtype).check()


@pytest.mark.parametrize("d", [5, 32, 64, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 507), (63, 1), (63, 130)])
def test_loss_of_odd_sizes(rows, columns, d):
    LossCase(rows, columns, d).check()


def test_loss_of_no_rows():
    losses, of_queries, of_items = LossCase(0, 40).run(loss_by_gpu)
    assert losses.shape == (0,) and of_queries.shape == (0, 32) and not of_items.any()


@pytest.mark.parametrize("masked_columns", [slice(0, 64), slice(128, 200), slice(0, 200)])
def test_loss_where_whole_tiles_are_masked(masked_columns):
    in_history = torch.zeros(2, 200, dtype=torch.bool)
    in_history[:, masked_columns] = True
    LossCase(20, 200, users=2, has_item=in_history).check()


@pytest.mark.parametrize("wanted", [(), (0,), (1,)])
def test_loss_gradients_of_only_queries_or_items(wanted):
    case = LossCase(9, 40)
    if wanted:
        case.check(wanted)
    else:
        losses = loss_by_gpu(case.queries, case.items, **case.keywords)
        assert not losses.requires_grad


@pytest.mark.parametrize("gradient", ["scalar", "expanded", "strided"])
def test_loss_gradients_of_any_stride(gradient):
    case = LossCase(50, 40)
    case.gradient = {
        "scalar": torch.full((50,), 1 / 50, device=DEVICE),
        "expanded": torch.ones((), device=DEVICE).expand(50),
        "strided": torch.randn(50, 3, device=DEVICE)[:, 1],
    }[gradient]
    case.check()
    if gradient == "scalar":
        leaves = [case.queries.clone().requires_grad_(), case.items.clone().requires_grad_()]
        loss = kernels.inbatch_cross_entropy(*leaves, **case.keywords, form="gpu")
        _, *expected = case.run(loss_by_gpu)
        for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


ANY_SHAPE = {
    "rows": st.integers(1, 90),
    "columns": st.integers(1, 150),
    "d": st.sampled_from([1, 16, 33]),
    "users": st.integers(1, 9),
}


@settings(max_examples=5, deadline=None, phases=UNSHRUNK)
@given(**ANY_SHAPE)
def test_loss_of_any_shape(rows, columns, d, users):
    LossCase(rows, columns, d, users).check()


@pytest.mark.long
@settings(max_examples=60, deadline=None, phases=UNSHRUNK)
@given(**ANY_SHAPE)
def test_loss_of_many_more_shapes(rows, columns, d, users):
    LossCase(rows, columns, d, users).check()


def test_loss_of_large_scores_stays_finite():
    case = LossCase(30, 70)
    case.queries = 300 * case.queries
    losses, *gradients = case.run(loss_by_gpu)
    assert losses.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(losses, case.run(loss_reference.inbatch_cross_entropy)[0], rtol=1e-4, atol=1e-3)


def test_queries_and_items_may_be_columns_of_wider_tensors():
    case = LossCase(9, 20)
    whole = [torch.cat([tensor, tensor], dim=1) for tensor in (case.queries, case.items)]
    views = [tensor[:, 16:48] for tensor in whole]
    transposed = [view.T.contiguous().T for view in views]
    expected = loss_reference.inbatch_cross_entropy(*views, **case.keywords)
    for operands in (views, transposed):
        torch.testing.assert_close(loss_by_gpu(*operands, **case.keywords), expected, rtol=1e-5, atol=1e-5)


def test_a_target_that_its_users_bits_lack_counts_once_all_the_same():
    case = LossCase(9, 40)
    case.keywords["history_bits"].zero_()
    case.check()


def test_the_kernels_run_when_the_gpu_form_is_named():
    launch.launches.clear()
    for d in (32, 64, 128):
        LossCase(3, 5, d).run(loss_by_gpu)
    assert launch.launches == dict.fromkeys(("loss_forward", "loss_query_gradients", "loss_item_gradients"), 3)


def test_inputs_of_any_stride():
    case = LossCase(20, 70)
    keywords = {name: strided(value) for name, value in case.keywords.items()}
    ours = loss_by_gpu(strided(case.queries), strided(case.items), **keywords)
    expected = loss_reference.inbatch_cross_entropy(case.queries, case.items, **case.keywords)
    torch.testing.assert_close(ours, expected)


def test_equal_calls_give_equal_bits():
    case = LossCase(37, 83)
    for first, second in zip(case.run(loss_by_gpu), case.run(loss_by_gpu), strict=True):
        assert torch.equal(first, second)
