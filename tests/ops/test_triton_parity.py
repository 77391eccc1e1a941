"""The Triton kernels against their references: in the interpreter without a GPU, compiled where there is one.

A result is as good as the reference's when its error against the reference in fp64 is at most eight times that of the
reference in the same precision, or a few units in the last place. Sums in another order differ by more than twice where
much cancels, as in a gate's gradient; wrong mathematics differs by a thousand times. On a GPU the bound is twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.kernel_cases import (
    DEVICE,
    INTRA_AND_INTER,
    LossCase,
    SideCase,
    by_triton,
    loss_by_triton,
    rank_case,
    relative_error,
)
from iisan_fast import kernels
from iisan_fast.kernels import reference
from iisan_fast.kernels.gpu import launch
from iisan_fast.kernels.gpu import side_towers as side_network
from iisan_fast.kernels.reference import States, Tower

UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # the interpreter is too slow to shrink an example in
SIDE_FORWARD = ("side_project", "side_recur", "side_expand")
SIDE_BACKWARD = ("side_collect", "side_recur_backward", "side_weight_gradients", "side_mix_gradients")


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integers), so what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_three_towers(gated, activation, dtype):
    SideCase(gated=gated, activation=activation, dtype=dtype).check()


@pytest.mark.parametrize(
    "case",
    [
        {"items": 1, "layers": 1, "kinds": [(0,)]},
        {"items": 17, "layers": 9, "width": 40, "bottleneck": 8, "kinds": [(0, 1)]},  # more layers than a group holds
        {
            "items": 5,
            "width": 96,
            "bottleneck": 70,
            "kinds": [(1,)],
            "activation": "gelu",
        },  # more than a tile of bottleneck
        {"items": 33, "kinds": [(0, 1)], "dense": [1]},  # as after width alignment
        {"items": 7, "layers": 5, "kinds": [(0, 1), (0,)], "dense": [0, 1], "gated": False},
        {"items": 6, "kinds": [(0,), (0,)], "dense": [0]},  # one view, and no second to take a gradient
        {"items": 6, "kinds": [(1,)], "dense": [1]},
        {"items": 5, "layers": 7, "width": 768, "bottleneck": 64, "dtype": torch.float16},
    ],
)
def test_other_shapes(case):
    SideCase(**case).check()


@settings(max_examples=8, deadline=None, phases=UNSHRUNK)
@given(st.data())
def test_any_shape(data):
    kinds = data.draw(st.lists(st.sampled_from(INTRA_AND_INTER), min_size=1, max_size=3))
    SideCase(
        items=data.draw(st.integers(1, 40)),
        layers=data.draw(st.integers(1, 6)),
        width=data.draw(st.sampled_from([20, 48, 65, 96])),
        bottleneck=data.draw(st.sampled_from([1, 8, 20, 32])),
        kinds=kinds,
        gated=data.draw(st.booleans()),
        dense=data.draw(st.lists(st.sampled_from(sorted({view for kind in kinds for view in kind})), unique=True)),
    ).check()


def test_every_subset_of_gradients():
    """Numbers 0 to 4 are a tower's parameters, 5 is the dense view."""
    case = SideCase(items=2, layers=1, width=16, bottleneck=8, kinds=[(0, 1)], dense=[1])
    for count in range(1, 7):
        for wanted in itertools.combinations(range(6), count):
            case.check(wanted)


def test_gradients_of_any_stride():
    case = SideCase(items=9, kinds=[(0,), (0,)])
    case.gradients = [torch.ones((), device=DEVICE).expand(9, 48), case.gradients[0].T.contiguous().T]
    case.check()


def test_the_gradient_of_a_sum():
    case = SideCase(items=4, kinds=[(0,)])
    parameter = case.towers[0].down_weight.requires_grad_()
    (ours,) = torch.autograd.grad(by_triton(case.states, case.towers)[0].sum(), parameter)
    (theirs,) = torch.autograd.grad(reference.side_towers(case.states, case.towers)[0].sum(), parameter)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_items():
    case = SideCase(items=0)
    assert all(not tensor.any() for tensor in case.run(by_triton))


def test_saturated_gates():
    """Gates of 0 and 1 to the last bit; what they close off takes no gradient and does not become NaN."""
    case = SideCase(layers=4)
    for tower in case.towers:
        tower.gate.copy_(torch.tensor([30.0, -30.0, 8.0, -8.0]))
    for mine, exact in zip(case.run(by_triton), case.run(reference.side_towers, torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_tables_may_be_slices_of_deeper_ones():
    case = SideCase(layers=4)
    whole = [view.table for view in case.states]
    sliced = [States(table[:, 1:], view.rows) for table, view in zip(whole, case.states)]
    towers = [Tower(t.views, *(p[1:] for p in t[1:])) for t in case.towers]
    for ours, theirs in zip(by_triton(sliced, towers), reference.side_towers(sliced, towers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_half_precision_tables_with_fp32_weights():
    """How a GPU trains: operands in the table's dtype, sums and gradients in fp32."""
    case = SideCase(layers=4)
    halved = [States(view.table.half(), view.rows) for view in case.states]
    weights = [p.requires_grad_() for tower in case.towers for p in tower[1:]]
    ours, theirs = (op(halved, case.towers) for op in (by_triton, reference.side_towers))
    assert {output.dtype for output in ours} == {torch.float32}
    for mine, exact in zip(
        [*ours, *torch.autograd.grad(ours, weights, case.gradients)],
        [*theirs, *torch.autograd.grad(theirs, weights, case.gradients)],
        strict=True,
    ):
        assert mine.dtype == exact.dtype and relative_error(mine, exact.double()) < 4 * torch.finfo(torch.float16).eps


def test_small_gradients_of_towers_do_not_underflow_in_fp16():
    """A mean over 30,000 rows leaves gradients below fp16's range."""
    case = SideCase(dtype=torch.float16, kinds=[(0,)])
    tower = Tower((0,), *(parameter.float() for parameter in case.towers[0][1:]))
    for name in ("gate", "down_weight", "up_weight"):
        leaf = getattr(tower, name).requires_grad_()
        ours, exact = (
            torch.autograd.grad(op(case.states, [tower]), leaf, [1e-7 * case.gradients[0].float()])[0]
            for op in (by_triton, reference.side_towers)
        )
        assert relative_error(ours, exact.double()) < 0.01, name


def test_small_gradients_of_the_loss_do_not_underflow_in_fp16():
    case = LossCase(30, 50, dtype=torch.float16)
    large, small = (
        torch.autograd.grad(loss_by_triton(case.queries, leaf, **case.keywords), leaf, case.gradient * scale)[0]
        for scale in (1.0, 1 / 256)
        for leaf in [case.items.clone().requires_grad_()]
    )
    assert relative_error(256 * small.float(), large.double()) < 0.001


def test_views_of_two_dtypes():
    """A half-precision table beside an aligned view in fp32, and beside a table in fp32."""
    for dense in ([1], []):
        case = SideCase(layers=4, kinds=[(0, 1)], dense=dense)
        states = [case.states[0]._replace(table=case.states[0].table.half()), case.states[1]]
        leaves = [p.requires_grad_() for p in case.towers[0][1:]] + [
            states[view].table.requires_grad_() for view in dense
        ]
        for op in (by_triton, reference.side_towers):
            (output,) = op(states, case.towers)
            results = [output, *torch.autograd.grad(output, leaves, case.gradients)]
            if op is by_triton:
                ours = results
        for mine, exact in zip(ours, results, strict=True):
            assert relative_error(mine, exact.double()) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("width", "bottleneck"), [(384, 512), (768, 8), (768, 64), (1024, 8), (1152, 100), (4096, 8), (4096, 64)]
)
def test_kernels_run_for_every_width_and_bottleneck_claimed(width, bottleneck):
    launch.launches.clear()
    SideCase(items=2, layers=2, width=width, bottleneck=bottleneck, kinds=[(0, 1)]).check()
    assert launch.launches == dict.fromkeys((*SIDE_FORWARD, *SIDE_BACKWARD), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("masked", "counted", "debiased"), list(itertools.product([True, False], repeat=3)))
def test_loss_in_all_its_forms(masked, counted, debiased, dtype):
    LossCase(37, 83, masked=masked, counted=counted, debiased=debiased, dtype=dtype).check()


@pytest.mark.parametrize("d", [5, 32, 64, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 507), (63, 1), (63, 130)])
def test_loss_of_odd_sizes(rows, columns, d):
    LossCase(rows, columns, d).check()


def test_loss_of_no_rows():
    losses, of_queries, of_items = LossCase(0, 40).run(loss_by_triton)
    assert losses.shape == (0,) and of_queries.shape == (0, 32) and not of_items.any()


@pytest.mark.parametrize("masked_columns", [slice(0, 64), slice(128, 200), slice(0, 200)])
def test_loss_where_whole_tiles_are_masked(masked_columns):
    own = torch.zeros(2, 200, dtype=torch.bool)
    own[:, masked_columns] = True
    LossCase(20, 200, users=2, own=own).check()


@pytest.mark.parametrize("wanted", [(), (0,), (1,)])
def test_loss_gradients_of_queries_or_items_alone(wanted):
    case = LossCase(9, 40)
    if wanted:
        case.check(wanted)
    else:
        losses = loss_by_triton(case.queries, case.items, **case.keywords)
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
        loss = kernels.inbatch_cross_entropy(*leaves, **case.keywords, backend="triton")
        _, *expected = case.run(loss_by_triton)
        for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@settings(max_examples=15, deadline=None, phases=UNSHRUNK)
@given(rows=st.integers(1, 90), columns=st.integers(1, 150), d=st.sampled_from([1, 16, 33]), users=st.integers(1, 9))
def test_loss_of_any_shape(rows, columns, d, users):
    LossCase(rows, columns, d, users).check()


def test_loss_of_large_scores_stays_finite():
    case = LossCase(30, 70)
    case.queries = 300 * case.queries
    losses, *gradients = case.run(loss_by_triton)
    assert losses.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(losses, case.run(reference.row_losses)[0], rtol=1e-4, atol=1e-3)


def test_the_layers_of_a_table_may_lie_far_apart():
    """Layers first in memory, as a matrix product over layers leaves them."""
    case = SideCase(layers=4, dense=[1], kinds=[(0, 1)])
    case.states = [view._replace(table=view.table.transpose(0, 1).contiguous().transpose(0, 1)) for view in case.states]
    case.check()


def test_queries_and_items_may_be_columns_of_wider_tensors():
    case = LossCase(9, 20)
    whole = [torch.cat([tensor, tensor], dim=1) for tensor in (case.queries, case.items)]
    views = [tensor[:, 16:48] for tensor in whole]
    transposed = [view.T.contiguous().T for view in views]
    expected = reference.row_losses(*views, **case.keywords)
    for operands in (views, transposed):
        torch.testing.assert_close(loss_by_triton(*operands, **case.keywords), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("users", "catalogue", "d", "excluded"), [(1, 1, 4, 0), (1, 507, 32, 12), (63, 100, 64, 3), (20, 33, 5, 1)]
)
def test_ranks(users, catalogue, d, excluded, dtype):
    queries, items, *rest = rank_case(users, catalogue, d, excluded)
    for tie_share in (0.5, 0.0):
        ours = kernels.target_rank(queries.to(dtype), items.to(dtype), *rest, tie_share=tie_share, backend="triton")
        exact = reference.target_rank(queries.double(), items.double(), *rest, tie_share=tie_share)
        assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])


def test_items_of_equal_vectors_tie_whatever_their_place():
    queries, items = torch.randn(19, 24, device=DEVICE), torch.randn(90, 24, device=DEVICE)
    items[torch.tensor([3, 40, 77, 89])] = items[11].clone()
    targets = torch.full((19,), 11, device=DEVICE)
    none = torch.full((19, 1), -1, device=DEVICE)
    _, ranks = kernels.target_rank(queries, items, targets, none, backend="triton")
    scores = queries.double() @ items.double().T
    higher = (scores > scores[:, 11:12] + 1e-6).sum(1)
    assert torch.equal(ranks, 1 + higher + 4 / 2)


def test_ranks_of_scores_that_are_not_finite_are_nan():
    queries, items, targets, history = rank_case(5, 40, 8, 2)
    items[33, 2] = float("inf")
    queries[:, 2] = torch.tensor([1.0, 0, 1, -1, 2])  # 0 times infinity is no number either
    masked, unmasked = kernels.target_rank(queries, items, targets, history, backend="triton")
    assert masked.isnan().all() and unmasked.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_of_no_users(backend):
    queries, items, targets, history = rank_case(0, 40, 8, 2)
    for catalogue in (items, items[:0]):
        masked, unmasked = kernels.target_rank(queries, catalogue, targets, history[:, :0], backend=backend)
        assert masked.shape == unmasked.shape == (0,)


def test_a_target_that_its_users_bits_lack_counts_once_all_the_same():
    case = LossCase(9, 40)
    case.keywords["history_bits"].zero_()
    case.check()


def test_loss_and_rank_kernels_run_when_triton_is_asked_for():
    launch.launches.clear()
    for d in (32, 64, 128):
        LossCase(3, 5, d).run(loss_by_triton)
        kernels.target_rank(*rank_case(3, 9, d, 2), backend="triton")
    names = ("loss_forward", "loss_query_gradients", "loss_item_gradients", "target_rank")
    assert launch.launches == dict.fromkeys(names, 3)


def test_training_may_follow_inference():
    side_network._constants.cache_clear()
    case = SideCase(items=3, layers=2)
    with torch.inference_mode():
        by_triton(case.states, case.towers)
    case.check()


def strided(tensor: Tensor) -> Tensor:
    """Equal to the tensor, and every dimension strided."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("part", ["table", "rows", "down_weight", "up_weight", "up_bias", "gate"])
def test_tower_inputs_of_any_stride(part):
    case = SideCase(items=6, layers=4)
    if part in ("table", "rows"):
        case.states = [view._replace(**{part: strided(getattr(view, part))}) for view in case.states]
    else:
        case.towers = [tower._replace(**{part: strided(getattr(tower, part))}) for tower in case.towers]
    for mine, exact in zip(
        by_triton(case.states, case.towers), reference.side_towers(case.states, case.towers), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_loss_and_rank_inputs_of_any_stride():
    case = LossCase(20, 70)
    keywords = {name: strided(value) for name, value in case.keywords.items()}
    ours = loss_by_triton(strided(case.queries), strided(case.items), **keywords)
    torch.testing.assert_close(ours, reference.row_losses(case.queries, case.items, **case.keywords))
    arguments = rank_case(20, 33, 5, 3)
    ranks = kernels.target_rank(*map(strided, arguments), backend="triton")
    for mine, exact in zip(ranks, reference.target_rank(*arguments), strict=True):
        assert torch.equal(mine, exact)


def test_equal_calls_give_equal_bits():
    side, loss = SideCase(), LossCase(37, 83)
    for run in (lambda: side.run(by_triton), lambda: loss.run(loss_by_triton)):
        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)
