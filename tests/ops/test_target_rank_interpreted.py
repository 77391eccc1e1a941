"""The rank in Triton against the reference: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_cases import (
    DEVICE,
    added_case,
    assert_copies_tie,
    rank_case,
    strided,
    tied_case,
)
from iisan_fast import kernels
from iisan_fast.kernels import AddedScores
from iisan_fast.kernels.gpu import launch
from iisan_fast.kernels.reference import target_rank as rank_reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_in_new_memory")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("users", "catalogue", "d", "excluded"), [(1, 1, 4, 0), (1, 507, 32, 12), (63, 100, 64, 3), (20, 33, 5, 1)]
)
def test_ranks(users, catalogue, d, excluded, dtype):
    queries, items, *rest = rank_case(users, catalogue, d, excluded)
    for tie_share in (0.5, 0.0):
        ours = kernels.target_rank(queries.to(dtype), items.to(dtype), *rest, tie_share=tie_share, form="gpu")
        exact = rank_reference.target_rank(queries.double(), items.double(), *rest, tie_share=tie_share)
        assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])


def test_items_of_equal_vectors_tie_at_any_place():
    queries, items = torch.randn(19, 24, device=DEVICE), torch.randn(90, 24, device=DEVICE)
    items[torch.tensor([3, 40, 77, 89])] = items[11].clone()
    targets = torch.full((19,), 11, device=DEVICE)
    none = torch.full((19, 1), -1, device=DEVICE)
    _, ranks = kernels.target_rank(queries, items, targets, none, form="gpu")
    scores = queries.double() @ items.double().T
    higher = (scores > scores[:, 11:12] + 1e-6).sum(1)
    assert torch.equal(ranks, 1 + higher + 4 / 2)


def test_ranks_of_scores_that_are_not_finite_are_nan():
    queries, items, targets, history = rank_case(5, 40, 8, 2)
    items[33, 2] = float("inf")
    queries[:, 2] = torch.tensor([1.0, 0, 1, -1, 2])  # 0 times infinity is NaN too
    masked, unmasked = kernels.target_rank(queries, items, targets, history, form="gpu")
    assert masked.isnan().all() and unmasked.isnan().all()


@pytest.mark.parametrize("form", ["reference", "gpu"])
def test_ranks_of_no_users(form):
    queries, items, targets, history = rank_case(0, 40, 8, 2)
    for catalogue in (items, items[:0]):
        masked, unmasked = kernels.target_rank(queries, catalogue, targets, history[:, :0], form=form)
        assert masked.shape == unmasked.shape == (0,)


def test_the_kernel_runs_when_the_gpu_form_is_named():
    launch.launches.clear()
    for d in (32, 64, 128):
        kernels.target_rank(*rank_case(3, 9, d, 2), form="gpu")
    assert launch.launches == {"target_rank": 3}


def test_inputs_of_any_stride():
    arguments = rank_case(20, 33, 5, 3)
    ranks = kernels.target_rank(*map(strided, arguments), form="gpu")
    for mine, exact in zip(ranks, rank_reference.target_rank(*arguments), strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize(
    ("users", "catalogue", "d", "excluded", "dtype"),
    [(1, 1, 4, 0, torch.float16), (63, 70, 64, 3, torch.float32), (20, 33, 192, 1, torch.float16)],
)
def test_ranks_with_added_scores(users, catalogue, d, excluded, dtype):
    queries, items, *rest = rank_case(users, catalogue, d, excluded)
    added = added_case(*rest, catalogue, dtype)
    launch.launches.clear()
    ours = kernels.target_rank(queries.to(dtype), items.to(dtype), *rest, form="gpu", added=added)
    assert launch.launches == {"target_rank": 1, "target_rank_added": 1}
    exact = rank_reference.target_rank(
        queries.double(), items.double(), *rest, added=added._replace(values=added.values.double())
    )
    assert all(map(torch.equal, ours, exact))


def test_ranks_of_rows_in_several_chunks():
    case = rank_case(5, 21, 129, 3)
    ours = kernels.target_rank(*case, form="gpu")
    assert all(map(torch.equal, ours, rank_reference.target_rank(*case)))


def test_equal_items_with_equal_added_scores_tie():
    assert_copies_tie(tied_case(17, 20, torch.float32), "gpu")


def test_an_added_score_that_is_not_finite_breaks_only_its_users_rank():
    queries, items, targets, history = rank_case(4, 40, 8, 2)
    added = AddedScores(
        torch.tensor([0, 1, 2, 3, 3], device=DEVICE),
        torch.tensor([7, 7, 7], device=DEVICE),
        torch.tensor([float("inf"), 1, float("nan")], device=DEVICE),
    )
    for rank in kernels.target_rank(queries, items, targets, history, form="gpu", added=added):
        assert rank.isnan().tolist() == [True, False, True, False]


def test_added_scores_of_any_stride_and_of_no_users():
    arguments = rank_case(20, 33, 5, 3)
    added = added_case(*arguments[2:], 33, torch.float32)
    ranks = kernels.target_rank(*map(strided, arguments), form="gpu", added=AddedScores(*map(strided, added)))
    for mine, exact in zip(ranks, rank_reference.target_rank(*arguments, added=added), strict=True):
        assert torch.equal(mine, exact)
    nobody = rank_case(0, 40, 8, 2)
    for rank in kernels.target_rank(*nobody, form="gpu", added=added_case(*nobody[2:], 40, torch.float32)):
        assert rank.shape == (0,)
