"""The best items in Triton against a dense sort: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_cases import DEVICE, TopCase, assert_best_items, strided
from iisan_fast import kernels
from iisan_fast.kernels import AddedScores
from iisan_fast.kernels.gpu import launch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_in_new_memory")]


@pytest.mark.parametrize(
    ("users", "catalogue", "d", "count", "dtype"),
    [
        (0, 30, 4, 3, torch.float32),
        (1, 1, 4, 2, torch.float16),
        (1, 207, 32, 10, torch.float32),
        (20, 33, 5, 128, torch.float16),
        (33, 100, 192, 17, torch.float32),
        (3, 300, 129, 1, torch.float16),
    ],
)
def test_best_items_equal_a_dense_sort(users, catalogue, d, count, dtype):
    launch.launches.clear()
    assert_best_items(TopCase(users, catalogue, d, dtype, DEVICE), count, "gpu")
    assert launch.launches == ({"top_items": 1} if users else {})


def test_best_items_without_histories_lists_and_added_scores():
    case = TopCase(20, 90, 8, torch.float32, DEVICE)
    case.excluded = case.excluded[:, :0]
    case.allowed[:] = True
    case.added = None
    expected, _ = case.sorted(5)
    rows, _ = kernels.top_items(case.queries, case.items, 5, case.excluded, form="gpu")
    assert torch.equal(rows, expected)


def test_a_slice_of_several_tiles(monkeypatch):
    """One program goes over the whole catalogue: its cursors and its best items pass from tile to tile."""
    chosen = kernels.Configuration({"BM": 16, "BN": 16, "PROGRAMS": 1}, warps=4, stages=1)
    monkeypatch.setitem(kernels.CONFIGURATIONS["top_items"], ("default", "fp32"), chosen)
    case = TopCase(19, 150, 8, torch.float32, DEVICE)
    assert_best_items(case, 5, "gpu")
    case.excluded = torch.arange(19 * 30, device=DEVICE).reshape(19, 30) % 149
    assert_best_items(case, 20, "gpu")
    everywhere = torch.arange(19, device=DEVICE) * 150
    case.added = AddedScores(
        torch.cat([everywhere, everywhere[-1:] + 150]),
        torch.arange(150, device=DEVICE).repeat(19),
        torch.arange(19 * 150, device=DEVICE).remainder(7).float(),
    )
    assert_best_items(case, 9, "gpu")


def test_equal_items_tie_and_the_lower_row_comes_first():
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(120, generator=generator)
    vectors = torch.randn(60, 24, generator=generator).repeat(2, 1)[order].to(DEVICE)
    queries = torch.randn(17, 24, generator=generator).to(DEVICE)
    rows, values = kernels.top_items(queries, vectors, 20, torch.full((17, 1), -1, device=DEVICE), form="gpu")
    first, second = rows[:, ::2].cpu(), rows[:, 1::2].cpu()
    assert torch.equal(order[first] % 60, order[second] % 60) and (first < second).all()
    assert torch.equal(values[:, ::2], values[:, 1::2])


def test_scores_that_are_not_finite_break_their_users_alone():
    case = TopCase(5, 40, 8, torch.float32, DEVICE)
    case.queries[1, 3] = float("nan")
    case.added = AddedScores(
        torch.tensor([0, 1, 1, 2, 3, 3], device=DEVICE),
        torch.tensor([7, 7, 7], device=DEVICE),
        torch.tensor([float("inf"), 1, float("nan")], device=DEVICE),
    )
    case.allowed[7] = False
    case.excluded[:, 0] = 7
    rows, values = case.best(4, "gpu")
    assert values.isnan().any(dim=1).tolist() == [True, True, False, True, False]
    assert values[[0, 1, 3]].isnan().all() and (rows[[0, 1, 3]] == -1).all() and (rows[[2, 4]] >= 0).all()
    case.items[39] = float("inf")
    assert case.best(50, "gpu")[1].isnan().all()


def test_negative_zero_ties_with_zero():
    queries = torch.tensor([[1.0, 1.0]], device=DEVICE)
    items = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-0.0, -0.0], [1.0, -1.0], [0.5, 0.0]], device=DEVICE)
    nothing = torch.empty(1, 0, dtype=torch.int64, device=DEVICE)
    rows, _ = kernels.top_items(queries, items, 5, nothing, form="gpu")
    assert rows.tolist() == [[4, 0, 1, 2, 3]]


def test_inputs_of_any_stride():
    case = TopCase(20, 33, 5, torch.float32, DEVICE)
    expected = case.best(6, "gpu")
    assert case.added is not None
    case.added = AddedScores(*map(strided, case.added))
    case.queries, case.items, case.excluded, case.allowed = map(
        strided, (case.queries, case.items, case.excluded, case.allowed)
    )
    assert all(map(torch.equal, case.best(6, "gpu"), expected))
    case.items = torch.cat([case.items, torch.full_like(case.items, torch.nan)], dim=1)[:, :5]
    assert all(map(torch.equal, case.best(6, "gpu"), expected))


def test_a_large_count_is_refused_by_name():
    case = TopCase(2, 200, 5, torch.float32, DEVICE)
    message = "gpu cannot run top_items: it needs a count of at most 128, found 129; use (cpu|reference)"
    with pytest.raises(kernels.FormError, match=message):
        case.best(129, "gpu")
