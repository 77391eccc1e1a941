"""The best items of users on a CPU against a dense sort that shares no code with the op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.kernel_cases import TopCase, assert_best_items, strided
from iisan_fast import kernels
from iisan_fast.kernels import AddedScores, score_keys
from iisan_fast.kernels.cpu import score_tiles

pytestmark = pytest.mark.usefixtures("two_threads_and_nan_in_new_memory")

each_form = pytest.mark.parametrize("form", ["reference", "cpu"])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_best_items_equal_a_sorted_list(data):
    users, catalogue = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    scores = st.lists(st.integers(-2, 2), min_size=catalogue, max_size=catalogue)
    table = data.draw(st.lists(scores, min_size=users, max_size=users))
    excluded = data.draw(st.lists(st.lists(st.integers(-1, catalogue - 1), min_size=3, max_size=3), min_size=users))
    allowed = data.draw(st.none() | st.lists(st.booleans(), min_size=catalogue, max_size=catalogue))
    entries = st.dictionaries(st.integers(0, catalogue - 1), st.integers(-3, 3))
    added = data.draw(st.lists(entries, min_size=users, max_size=users))
    count = data.draw(st.integers(1, 12))
    listed = [sorted(of_user.items()) for of_user in added]
    flat = [entry for of_user in listed for entry in of_user]
    rows, values = kernels.top_items(
        torch.tensor(table, dtype=torch.float32).reshape(users, catalogue),
        torch.eye(catalogue),
        count,
        torch.tensor(excluded[:users], dtype=torch.int64).reshape(users, 3),
        None if allowed is None else torch.tensor(allowed),
        chunk_elements=data.draw(st.integers(1, 40)),
        form=data.draw(st.sampled_from(["reference", "cpu"])),
        added=AddedScores(
            torch.tensor([0, *map(len, listed)]).cumsum(0),
            torch.tensor([item for item, _ in flat], dtype=torch.int64),
            torch.tensor([float(value) for _, value in flat]),
        ),
    )
    for user in range(users):
        total = [score + added[user].get(item, 0) for item, score in enumerate(table[user])]
        left = [i for i in range(catalogue) if i not in excluded[user] and (allowed is None or allowed[i])]
        best = sorted(left, key=lambda item: (-total[item], item))[:count]
        missing = count - len(best)
        assert rows[user].tolist() == best + [-1] * missing
        assert values[user].tolist() == [total[item] for item in best] + [-float("inf")] * missing
    assert rows.shape == values.shape == (users, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("users", "catalogue", "d", "count"),
    [
        (0, 30, 4, 3),
        (1, 1, 1, 1),
        (1, 3001, 5, 10),
        (47, 767, 8, 767),
        (49, 769, 7, 1000),
        (240, 1921, 8, 10),
        (769, 768, 3, 1),
        (100, 2000, 6, 300),
    ],
)
def test_best_items_equal_a_dense_sort(users, catalogue, d, count, dtype):
    """Scores are small integers, exact in every dtype, and most of them tie across words and tiles."""
    assert score_tiles.USERS == score_tiles.ITEMS == 768
    assert_best_items(TopCase(users, catalogue, d, dtype), count, "cpu")


@pytest.mark.parametrize("chunk_elements", [1, 48 * 48 * 5, 10**5, 1 << 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_best_items_do_not_depend_on_the_tiles(chunk_elements, threads):
    torch.set_num_threads(threads)
    for count in (1, 10, 100):
        assert_best_items(TopCase(150, 901, 5, torch.float32), count, "cpu", chunk_elements)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "random"])
@pytest.mark.parametrize("count", [1, 9, 64])
def test_items_in_any_order_of_scores(order, count):
    """Rising scores replace all best items in every tile, equal ones none."""
    numbers = torch.arange(2000.0)
    generator = torch.Generator().manual_seed(0)
    orders = {"rising": numbers, "falling": -numbers, "equal": 0 * numbers}
    items = orders.get(order, numbers[torch.randperm(2000, generator=generator)])[:, None]
    queries = torch.tensor([[1.0], [-1.0], [0.0], [-0.0]])
    nothing = torch.empty(4, 0, dtype=torch.int64)
    rows, values = kernels.top_items(queries, items, count, nothing, chunk_elements=48 * 48, form="cpu")
    expected = (queries.double() @ items.double().T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, expected.indices[:, :count]) and torch.equal(values.double(), expected.values[:, :count])


@each_form
def test_random_scores_are_in_the_order_of_exact_ones(form):
    """Of random scores no two of a user are as close as rounding, so the order is that of a product in float64."""
    generator = torch.Generator().manual_seed(1)
    queries, items = torch.randn(70, 33, generator=generator), torch.randn(5000, 33, generator=generator)
    exact, expected = (queries.double() @ items.double().T).sort(dim=1, descending=True)
    clear = (exact[:, :20] - exact[:, 1:21]).amin(dim=1) > 1e-4
    assert clear.sum() > 30
    rows, values = kernels.top_items(queries, items, 20, torch.full((70, 1), -1), form=form)
    assert torch.equal(rows[clear], expected[clear, :20])
    torch.testing.assert_close(values.double(), exact[:, :20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("users", "catalogue", "d"), [(63, 253, 64), (800, 900, 33), (5, 1300, 897)])
def test_equal_items_tie_and_the_lower_row_comes_first(users, catalogue, d):
    """Every item stands twice in the catalogue: the copies follow each other, at any places."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(2 * catalogue, generator=generator)
    vectors = torch.randn(catalogue, d, generator=generator)
    queries = torch.randn(users, d, generator=generator)
    rows, values = kernels.top_items(queries, vectors.repeat(2, 1)[order], 20, torch.full((users, 1), -1), form="cpu")
    first, second = rows[:, ::2], rows[:, 1::2]
    pairs = order[first] % catalogue == order[second] % catalogue
    assert pairs.double().mean() > 0.998  # two scores in a million are equal by chance
    assert torch.equal(values[:, ::2][pairs], values[:, 1::2][pairs]) and (first < second)[pairs].all()


@each_form
def test_nothing_is_left_where_no_item_is_allowed(form):
    case = TopCase(5, 60, 3, torch.float32)
    case.allowed = torch.zeros(60, dtype=torch.bool)
    rows, values = case.best(4, form)
    assert (rows == -1).all() and (values == -torch.inf).all()
    case.allowed[[7, 59]] = True
    case.excluded[:] = torch.tensor([7, 7, -1, 3, 7, -1])
    rows, _ = case.best(4, form)
    assert torch.equal(rows, torch.tensor([[59, -1, -1, -1]]).repeat(5, 1))


@each_form
@pytest.mark.parametrize("count", [1, 30])
def test_a_catalogue_without_items(form, count):
    case = TopCase(3, 1, 2, torch.float32)
    nothing = torch.empty(3, 0, dtype=torch.int64)
    rows, values = kernels.top_items(case.queries, case.items[:0], count, nothing, form=form)
    assert rows.shape == values.shape == (3, count) and (rows == -1).all() and (values == -torch.inf).all()


# Scores that are not finite


def assert_broken(case: TopCase, broken: list[int]) -> None:
    """Check that these users alone have -1 and NaN, and the others what they have without them."""
    others = torch.ones(len(case.queries), dtype=torch.bool)
    others[broken] = False
    for form in ("reference", "cpu"):
        rows, values = case.best(6, form, chunk_elements=48 * 48)
        assert (rows[~others] == -1).all() and values[~others].isnan().all()
        assert (rows[others] >= 0).all() and values[others].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_breaks_only_its_user(value):
    case = TopCase(100, 600, 6, torch.float32)
    expected = case.best(6, "cpu")
    case.queries[17, 3] = case.queries[99, 0] = value
    assert_broken(case, [17, 99])
    sound = [user for user in range(100) if user not in (17, 99)]
    assert all(torch.equal(ours[sound], before[sound]) for ours, before in zip(case.best(6, "cpu"), expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_item_that_is_not_finite_breaks_all_users_though_it_is_left_out(value):
    case = TopCase(20, 600, 6, torch.float32)
    case.items[599, 2] = value
    case.allowed[599] = False
    case.excluded[:, 0] = 599
    assert_broken(case, list(range(20)))


@each_form
def test_a_broken_user_has_nan_in_the_columns_beyond_the_catalogue(form):
    case = TopCase(3, 5, 2, torch.float32)
    case.queries[1, 0] = float("nan")
    rows, values = case.best(9, form)
    assert (rows[1] == -1).all() and values[1].isnan().all()
    assert (values[[0, 2], 5:] == -torch.inf).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_an_added_score_that_is_not_finite_breaks_only_its_user(value):
    case = TopCase(4, 600, 6, torch.float32)
    case.queries[:, 0] = 1
    case.items[7] = torch.tensor([3e38, 0, 0, 0, 0, 0])
    case.added = AddedScores(torch.tensor([0, 1, 2, 3, 3]), torch.tensor([7, 7, 7]), torch.tensor([value, 1, value]))
    assert_broken(case, [0, 2])
    case.allowed[7] = False
    case.excluded[:, 0] = 7
    assert_broken(case, [0, 2])


def test_scores_that_overflow_break_only_their_users():
    case = TopCase(50, 900, 6, torch.float32)
    case.queries[:] = 1 + case.queries.abs()
    case.items[:] = 1 + case.items.abs()
    case.added = None
    case.queries[[3, 30]] *= 1e30
    case.items *= 1e20
    assert_broken(case, [3, 30])


# Inputs of any layout


@each_form
def test_inputs_of_any_stride_and_without_gradients(form):
    case = TopCase(60, 803, 8, torch.float32)
    expected = case.best(10, form)
    case.queries, case.items, case.excluded, case.allowed = map(
        strided, (case.queries, case.items, case.excluded, case.allowed)
    )
    case.added = AddedScores(*map(strided, case.added))
    assert all(map(torch.equal, case.best(10, form), expected))
    wider = torch.cat([case.items, torch.full((803, 5), torch.nan)], dim=1)
    case.items = wider[:, :8].requires_grad_()
    case.queries = torch.cat([torch.full((60, 3), torch.nan), case.queries], dim=1)[:, 3:].requires_grad_()
    with torch.inference_mode():
        quiet = case.best(10, form)
    if form == "cpu":
        assert not case.best(10, form)[1].requires_grad
    assert all(map(torch.equal, quiet, expected))
    assert all(torch.equal(ours.detach(), theirs) for ours, theirs in zip(case.best(10, form), expected))


def test_the_arguments_are_not_changed():
    case = TopCase(60, 803, 8, torch.float32)
    before = [tensor.clone() for tensor in case.tensors()]
    case.best(10, "cpu")
    assert all(map(torch.equal, case.tensors(), before))


# Forms and arguments


def test_float64_takes_the_reference():
    case = TopCase(9, 80, 4, torch.float64)
    assert_best_items(case, 5, "auto")
    message = "cpu cannot run top_items: it needs float32, bfloat16 or float16, found float64; use reference"
    with pytest.raises(kernels.FormError, match=message):
        case.best(5, "cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "count: expected a whole number from 1, found 0"),
        ({"count": 2.0}, "count: expected a whole number from 1, found 2.0"),
        ({"excluded": torch.zeros(3, 2, dtype=torch.int64)}, "excluded: expected 4 rows, found 3"),
        ({"excluded": torch.full((4, 2), 9)}, "excluded: expected indices from -1 to 8, found 9"),
        ({"allowed": torch.ones(9)}, "allowed: expected bool, found float32"),
        ({"allowed": torch.ones(8, dtype=torch.bool)}, r"allowed: expected \[9\], found \[8\]"),
        ({"queries": torch.ones(4, 7)}, r"queries: expected \[rows, 8\] as items are wide, found \[4, 7\]"),
    ],
)
def test_the_best_items_refuse(changed, message):
    case = TopCase(4, 9, 8, torch.float32)
    arguments = {"queries": case.queries, "items": case.items, "count": 3, "excluded": case.excluded} | changed
    with pytest.raises(ValueError, match=message):
        kernels.top_items(**arguments)


# Keys


def test_keys_are_in_the_order_of_scores_and_of_rows_falling():
    scores = torch.tensor([-torch.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.5, 3e38])
    rows = torch.tensor([0, 5, 2**31 - 2])
    keys = score_keys.pack(scores[:, None], rows)
    ordered = [(score, -row) for score in scores.tolist() for row in rows.tolist()]
    by_key = keys.flatten().sort(stable=True).indices.tolist()
    assert [ordered[i] for i in by_key] == sorted(ordered)
    rows_again, values = score_keys.unpack(keys, torch.float32)
    assert torch.equal(values, scores[:, None].expand(-1, 3))
    assert torch.equal(rows_again[1:], rows.expand(8, -1)) and (rows_again[0] == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_hold_every_number_in_half_precision(dtype):
    every: Tensor = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    keys = score_keys.pack(finite, torch.arange(len(finite)))
    rows, values = score_keys.unpack(keys, dtype)
    assert torch.equal(values, finite) and torch.equal(rows, torch.arange(len(finite)))
    assert keys.min() > score_keys.NO_ITEM
    assert score_keys.unpack(torch.tensor([score_keys.NO_ITEM]), dtype)[0].tolist() == [-1]
