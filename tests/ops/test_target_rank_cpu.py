"""The target's rank on a CPU against exact counting, and against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers.kernel_cases import added_case, assert_copies_tie, rank_case, strided, tied_case
from iisan_fast import kernels
from iisan_fast.kernels.cpu import score_tiles
from iisan_fast.kernels.reference import target_rank as target_rank_reference

pytestmark = pytest.mark.usefixtures("two_threads_and_nan_in_new_memory")


class Ranking:
    """Users, a catalogue in which vectors repeat at random places, targets, and excluded items."""

    def __init__(self, users: int, catalogue: int, d: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        def numbers(limit: int, *shape: int, lowest: int = 0) -> Tensor:
            return torch.randint(lowest, limit, shape, generator=generator)

        self.queries = random(users, d)
        self.items = random(-(-catalogue // 5), d)[numbers(-(-catalogue // 5), catalogue)]
        self.targets = numbers(catalogue, users)
        self.excluded = numbers(catalogue, users, 6, lowest=-1)
        self.excluded[:, 1] = -1
        self.excluded[:, 2] = self.excluded[:, 3]  # an item twice in a history
        self.excluded[::4, 4] = self.targets[::4]
        # In about half of the rows, the history has an item whose vector equals the target's.
        equal = (self.items[self.targets[:, None]] == self.items).all(-1)
        self.excluded[1::2, 5] = equal.float().argmax(1)[1::2]

    def ranks(self, tie_share: float = 0.5, chunk_elements: int = 1 << 24) -> tuple[Tensor, Tensor]:
        return kernels.target_rank(
            self.queries, self.items, self.targets, self.excluded, tie_share, chunk_elements, form="cpu"
        )

    def counted(self, tie_share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return both ranks, counted in fp64 from the scores of distinct vectors, and the users whose ranks are unsure.

        A rank is unsure if the dtype cannot tell the score of another vector from the target's.
        """
        distinct, place = self.items.unique(dim=0, return_inverse=True)
        scores = (self.queries.double() @ distinct.double().T)[:, place]
        target = scores.gather(1, self.targets[:, None])
        higher, equal = scores > target, place == place[self.targets][:, None]
        left_out = torch.zeros(len(scores), len(self.items) + 1, dtype=torch.bool)
        left_out = left_out.scatter(1, self.excluded + 1, True)[:, 1:]
        others = torch.arange(len(self.items)) != self.targets[:, None]

        def rank(among: Tensor) -> Tensor:
            return 1 + (higher & ~equal & among).sum(1) + tie_share * (equal & others & among).sum(1).double()

        unreachable = left_out.gather(1, self.targets[:, None])[:, 0]
        rounding = 32 * torch.finfo(self.items.dtype).eps * self.queries.double().norm(dim=1, keepdim=True)
        close = (((scores - target).abs() <= rounding * distinct.double().norm(dim=1).max()) & ~equal).any(1)
        return rank(~left_out).masked_fill(unreachable, float("inf")), rank(others | ~others), close

    def check(self, tie_share: float = 0.5, chunk_elements: int = 1 << 24) -> None:
        *expected, close = self.counted(tie_share)
        assert close.sum() <= 0.2 * len(close)  # at least four in five ranks are checked
        for ours, exact in zip(self.ranks(tie_share, chunk_elements), expected, strict=True):
            assert ours.dtype == torch.float64 and torch.equal(ours[~close], exact[~close])


SHAPES = list(itertools.product([0, 1, 239, 240, 241], [47, 48, 1919, 1920, 1921, 4097]))


WIDTHS = (1, 5, 33, 64)


@pytest.mark.parametrize(
    ("users", "catalogue", "d"),
    [
        pytest.param(*shape, d, marks=[] if number % 4 == WIDTHS.index(d) else pytest.mark.long)
        for number, shape in enumerate(SHAPES)
        for d in WIDTHS
    ],
)
def test_ranks_equal_counting(users, catalogue, d):
    for dtype in (torch.float32, torch.float64):
        Ranking(users, catalogue, d, dtype).check()


@pytest.mark.parametrize("users", [767, 768, 769, 1537])
@pytest.mark.parametrize("catalogue", [767, 768, 769])
def test_ranks_at_the_edges_of_tiles(users, catalogue):
    assert score_tiles.USERS == score_tiles.ITEMS == 768
    Ranking(users, catalogue, 5, torch.float32).check()


@pytest.mark.parametrize("tie_share", [0.0, 0.5, 1.0])
def test_a_share_of_the_ties_counts_above_the_target(tie_share):
    case = Ranking(100, 500, 8, torch.float32)
    masked, unmasked = case.ranks(tie_share)
    lower, upper = case.ranks(0.0)[1], case.ranks(1.0)[1]
    assert (upper > lower).float().mean() > 0.9  # nearly all targets have equals
    assert torch.equal(unmasked, lower + tie_share * (upper - lower)) and (masked <= unmasked)[~masked.isinf()].all()
    case.check(tie_share)


@pytest.mark.parametrize("chunk_elements", [1, 48 * 48, 48 * 48 * 5, 10**5, 1 << 24, 1 << 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_ranks_do_not_depend_on_the_tiles(chunk_elements, threads):
    torch.set_num_threads(threads)
    Ranking(150, 401, 33, torch.float32).check(chunk_elements=chunk_elements)


def test_equal_parts_are_whole_steps_within_their_bound():
    for count, most, multiple in itertools.product([0, 1, 48, 49, 767, 12_076], [1, 48, 100, 768], [1, 2, 3]):
        size = score_tiles.equal_parts(count, most, multiple)
        assert size % 48 == 0 and 48 <= size <= max(48, most)
        assert size == 48 or -(-count // size) % multiple == 0 or -(-count // (size - 48)) > -(-count // size)


def test_nothing_is_left_out_of_a_ranking_without_histories():
    case = Ranking(30, 100, 5, torch.float64)
    for excluded in (case.excluded[:, :0], torch.full_like(case.excluded, -1)):
        case.excluded = excluded
        masked, unmasked = case.ranks()
        assert torch.equal(masked, unmasked)
        case.check()


def test_a_target_that_is_itself_left_out_is_out_of_reach():
    case = Ranking(40, 100, 5, torch.float32)
    case.excluded[:, 4] = case.targets
    masked, unmasked = case.ranks()
    assert masked.isinf().all() and unmasked.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_counts_are_exact_in_every_dtype(dtype):
    """Rank by small integers: their scores are exact even in half precision."""
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randint(-2, 3, (n, 8), generator=generator) for n in (60, 4097))
    targets = torch.randint(0, 4097, (60,), generator=generator)
    excluded = torch.randint(-1, 4097, (60, 7), generator=generator)
    ours = kernels.target_rank(queries.to(dtype), items.to(dtype), targets, excluded, form="cpu")
    exact = target_rank_reference.target_rank(queries.double(), items.double(), targets, excluded)
    for rank, truth in zip(ours, exact, strict=True):
        assert torch.equal(rank, truth)


def assert_broken_alone(case: Ranking, broken: Sequence[int]) -> None:
    """Check that exactly these rows have rank NaN, as in the reference, and the others have their ranks."""
    ours = case.ranks()
    theirs = target_rank_reference.target_rank(case.queries, case.items, case.targets, case.excluded)
    for rank, expected in zip(ours, theirs, strict=True):
        assert rank.isnan().nonzero()[:, 0].tolist() == expected.isnan().nonzero()[:, 0].tolist() == list(broken)
        whole = ~rank.isnan()
        assert torch.equal(rank[whole].isinf(), expected[whole].isinf())
    *exact, close = case.counted(0.5)
    sound = ~close & ~ours[0].isnan()
    assert all(torch.equal(rank[sound], truth[sound]) for rank, truth in zip(ours, exact))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_breaks_only_its_row(value):
    case = Ranking(50, 900, 6, torch.float32)
    case.queries[17, 3] = case.queries[49, 0] = value
    assert_broken_alone(case, [17, 49])


@pytest.mark.parametrize("item", [0, 899])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_item_that_is_not_finite_breaks_all_rows(item, value):
    case = Ranking(50, 900, 6, torch.float32)
    case.items[item, 2] = value
    case.queries[5] = 0  # 0 times infinity is NaN too
    for rank in case.ranks():
        assert rank.isnan().all()


def test_scores_that_overflow_break_only_their_rows():
    case = Ranking(50, 900, 6, torch.float32)
    case.queries[[3, 30]] *= 1e30
    case.items *= 1e20
    assert_broken_alone(case, [3, 30])
    case = Ranking(50, 900, 6, torch.float32)
    case.queries *= 1e15
    case.items *= 1e20
    assert_broken_alone(case, [])


def test_ranks_of_any_stride_and_without_gradients():
    case = Ranking(60, 300, 8, torch.float32)
    expected = case.ranks()
    for name in ("queries", "items", "targets", "excluded"):
        value = getattr(case, name)
        setattr(case, name, torch.stack([value, value], dim=-1)[..., 0])
    case.queries.requires_grad_()
    with torch.inference_mode():
        quiet = case.ranks()
    for ranks in (case.ranks(), quiet):
        assert all(torch.equal(rank, truth) and not rank.requires_grad for rank, truth in zip(ranks, expected))


# Added scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("users", "catalogue", "d", "excluded"), [(1, 1, 4, 0), (1, 507, 7, 12), (63, 507, 8, 3), (507, 63, 5, 2)]
)
def test_ranks_with_added_scores_equal_the_references(users, catalogue, d, excluded, dtype):
    queries, items, targets, history = (tensor.cpu() for tensor in rank_case(users, catalogue, d, excluded))
    added = added_case(targets, history, catalogue, dtype)
    exact = target_rank_reference.target_rank(
        queries.double(), items.double(), targets, history, added=added._replace(values=added.values.double())
    )
    for chunk_elements in (1, 1 << 24):
        ours = kernels.target_rank(
            queries.to(dtype), items.to(dtype), targets, history, 0.5, chunk_elements, form="cpu", added=added
        )
        assert all(map(torch.equal, ours, exact))
    if users > 1:
        plain = target_rank_reference.target_rank(queries.double(), items.double(), targets, history)
        assert not any(map(torch.equal, plain, exact))


@pytest.mark.parametrize(("users", "catalogue"), [(1, 900), (63, 253), (800, 1700)])
def test_a_user_may_add_to_every_score(users, catalogue):
    """The tiles are cut at 768 users and items; ranks are those of a product of queries and items that are wider."""
    queries, items, targets, history = (tensor.cpu().double() for tensor in rank_case(users, catalogue, 3, 4))
    targets, history = targets.long(), history.long()
    further = torch.randint(-3, 4, (users, 1)).double(), torch.randint(-3, 4, (catalogue, 1)).double()
    added = kernels.AddedScores(
        torch.arange(users + 1) * catalogue,
        torch.arange(catalogue).repeat(users),
        (further[0] @ further[1].T).flatten(),
    )
    ours = kernels.target_rank(queries, items, targets, history, form="cpu", added=added)
    wider = torch.cat([queries, further[0]], 1), torch.cat([items, further[1]], 1)
    assert all(map(torch.equal, ours, kernels.target_rank(*wider, targets, history, form="cpu")))


@pytest.mark.parametrize(("dtype", "users", "catalogue"), [(torch.float32, 63, 253), (torch.float64, 800, 900)])
def test_equal_items_with_equal_added_scores_tie(dtype, users, catalogue):
    assert_copies_tie(tied_case(users, catalogue, dtype, "cpu"), "cpu")


@pytest.mark.parametrize("form", ["reference", "cpu"])
def test_without_entries_the_ranks_are_the_plain_ones(form):
    for users in (0, 5):
        queries, items, targets, history = (tensor.cpu() for tensor in rank_case(users, 40, 8, 2))
        none = kernels.AddedScores(torch.zeros(users + 1, dtype=torch.int64), targets[:0], queries[0:0, 0])
        ours = kernels.target_rank(queries, items, targets, history, form=form, added=none)
        plain = kernels.target_rank(queries, items, targets, history, form=form)
        assert all(map(torch.equal, ours, plain)) and ours[0].shape == (users,)


def test_added_scores_of_any_stride():
    arguments = [tensor.cpu() for tensor in rank_case(20, 33, 5, 3)]
    added = added_case(arguments[2], arguments[3], 33, torch.float32)
    expected = kernels.target_rank(*arguments, form="cpu", added=added)
    apart = kernels.AddedScores(*map(strided, added))
    for form in ("cpu", "reference"):
        ranks = kernels.target_rank(*map(strided, arguments), form=form, added=apart)
        assert all(map(torch.equal, ranks, expected))
