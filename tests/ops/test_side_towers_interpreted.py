"""The towers in Triton against the reference: in the interpreter without a GPU, compiled where there is one.

A result is as good as the reference's when its error against the reference in fp64 is at most eight times that of the
reference in the same precision, or a few units in the last place. Sums in another order differ by more than twice where
much cancels, as in a gate's gradient; wrong mathematics differs by a thousand times. On a GPU the bound is twice.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.kernel_cases import (
    DEVICE,
    INTRA_AND_INTER,
    UNSHRUNK,
    SideCase,
    by_gpu,
    relative_error,
    strided,
)
from iisan_fast.kernels import States, Tower
from iisan_fast.kernels.gpu import launch, tower_operands
from iisan_fast.kernels.reference import side_towers as towers_reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_in_new_memory")]

SIDE_FORWARD = ("side_project", "side_recur", "side_expand")
SIDE_BACKWARD = ("side_collect", "side_recur_backward", "side_weight_gradients", "side_mix_gradients")


def in_the_long_run(gated: bool, activation: str, dtype: torch.dtype) -> bool:
    """Return True for half of the forms. The other half has all pairs of any two of the three choices."""
    return (gated + (activation == "relu") + (dtype == torch.float32)) % 2 == 0


@pytest.mark.parametrize(
    ("gated", "activation", "dtype"),
    [
        pytest.param(*form, marks=pytest.mark.long) if in_the_long_run(*form) else form
        for form in itertools.product([True, False], ["relu", "gelu"], [torch.float32, torch.float16])
    ],
)
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
        pytest.param(
            {"items": 5, "layers": 7, "width": 768, "bottleneck": 64, "dtype": torch.float16}, marks=pytest.mark.long
        ),
    ],
)
def test_other_shapes(case):
    SideCase(**case).check()


def check_any_shape(data: st.DataObject) -> None:
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


@settings(max_examples=2, deadline=None, phases=UNSHRUNK)
@given(st.data())
def test_any_shape(data):
    check_any_shape(data)


@pytest.mark.long
@settings(max_examples=40, deadline=None, phases=UNSHRUNK)
@given(st.data())
def test_many_more_shapes(data):
    check_any_shape(data)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((1, 5, 6), id="one, or all but one"), pytest.param((2, 3, 4), id="others", marks=pytest.mark.long)],
)
def test_every_subset_of_gradients(sizes):
    """Ask for every subset of gradients: numbers 0 to 4 are a tower's parameters, 5 is the dense view."""
    case = SideCase(items=2, layers=1, width=16, bottleneck=8, kinds=[(0, 1)], dense=[1])
    for count in sizes:
        for wanted in itertools.combinations(range(6), count):
            case.check(wanted)


def test_gradients_of_any_stride():
    case = SideCase(items=9, kinds=[(0,), (0,)])
    case.gradients = [torch.ones((), device=DEVICE).expand(9, 48), case.gradients[0].T.contiguous().T]
    case.check()


def test_the_gradient_of_a_sum():
    case = SideCase(items=4, kinds=[(0,)])
    parameter = case.towers[0].down_weight.requires_grad_()
    (ours,) = torch.autograd.grad(by_gpu(case.states, case.towers)[0].sum(), parameter)
    (theirs,) = torch.autograd.grad(towers_reference.side_towers(case.states, case.towers)[0].sum(), parameter)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_items():
    case = SideCase(items=0)
    assert all(not tensor.any() for tensor in case.run(by_gpu))


def test_saturated_gates():
    """Check gates of exactly 0 and 1: a state that they shut off has no gradient, and no NaN appears."""
    case = SideCase(items=5, layers=4)
    for tower in case.towers:
        tower.gate.copy_(torch.tensor([30.0, -30.0, 8.0, -8.0]))
    for mine, exact in zip(case.run(by_gpu), case.run(towers_reference.side_towers, torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_tables_may_be_slices_of_deeper_ones():
    case = SideCase(layers=4)
    whole = [view.table for view in case.states]
    sliced = [States(table[:, 1:], view.rows) for table, view in zip(whole, case.states)]
    towers = [Tower(t.views, *(p[1:] for p in t[1:])) for t in case.towers]
    for ours, theirs in zip(by_gpu(sliced, towers), towers_reference.side_towers(sliced, towers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_half_precision_tables_with_fp32_weights():
    """Train as on a GPU: operands in the table's dtype, sums and gradients in fp32."""
    case = SideCase(layers=4)
    halved = [States(view.table.half(), view.rows) for view in case.states]
    weights = [p.requires_grad_() for tower in case.towers for p in tower[1:]]
    ours, theirs = (op(halved, case.towers) for op in (by_gpu, towers_reference.side_towers))
    assert {output.dtype for output in ours} == {torch.float32}
    for mine, exact in zip(
        [*ours, *torch.autograd.grad(ours, weights, case.gradients)],
        [*theirs, *torch.autograd.grad(theirs, weights, case.gradients)],
        strict=True,
    ):
        assert mine.dtype == exact.dtype and relative_error(mine, exact.double()) < 4 * torch.finfo(torch.float16).eps


def test_small_gradients_of_towers_do_not_underflow_in_fp16():
    """Check gradients below fp16's range, as a mean over 30,000 rows gives them."""
    case = SideCase(dtype=torch.float16, kinds=[(0,)])
    tower = Tower((0,), *(parameter.float() for parameter in case.towers[0][1:]))
    for name in ("gate", "down_weight", "up_weight"):
        leaf = getattr(tower, name).requires_grad_()
        ours, exact = (
            torch.autograd.grad(op(case.states, [tower]), leaf, [1e-7 * case.gradients[0].float()])[0]
            for op in (by_gpu, towers_reference.side_towers)
        )
        assert relative_error(ours, exact.double()) < 0.01, name


def test_views_of_two_dtypes():
    """Combine a half-precision table with an aligned view in fp32, and with a table in fp32."""
    for dense in ([1], []):
        case = SideCase(layers=4, kinds=[(0, 1)], dense=dense)
        states = [case.states[0]._replace(table=case.states[0].table.half()), case.states[1]]
        leaves = [p.requires_grad_() for p in case.towers[0][1:]] + [
            states[view].table.requires_grad_() for view in dense
        ]
        for op in (by_gpu, towers_reference.side_towers):
            (output,) = op(states, case.towers)
            results = [output, *torch.autograd.grad(output, leaves, case.gradients)]
            if op is by_gpu:
                ours = results
        for mine, exact in zip(ours, results, strict=True):
            assert relative_error(mine, exact.double()) < 4 * torch.finfo(torch.float16).eps


WIDER = [(384, 512), (1024, 8), (1152, 100), (4096, 8), (4096, 64)]


@pytest.mark.parametrize(
    ("width", "bottleneck"),
    [(768, 8), (768, 64), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in WIDER)],
)
def test_kernels_run_for_every_width_and_bottleneck_claimed(width, bottleneck):
    launch.launches.clear()
    SideCase(items=2, layers=2, width=width, bottleneck=bottleneck, kinds=[(0, 1)]).check()
    expected = dict.fromkeys((*SIDE_FORWARD, *SIDE_BACKWARD), 1)
    assert launch.launches == expected | {"side_weight_gradients": 2}  # of down and of up


def test_the_layers_of_a_table_may_lie_far_apart():
    """Put layers first in memory, as the output of a matrix product over layers has them."""
    case = SideCase(layers=4, dense=[1], kinds=[(0, 1)])
    case.states = [view._replace(table=view.table.transpose(0, 1).contiguous().transpose(0, 1)) for view in case.states]
    case.check()


def test_training_may_follow_inference():
    tower_operands._constants.cache_clear()
    case = SideCase(items=3, layers=2)
    with torch.inference_mode():
        by_gpu(case.states, case.towers)
    case.check()


@pytest.mark.parametrize("part", ["table", "rows", "down_weight", "up_weight", "up_bias", "gate"])
def test_tower_inputs_of_any_stride(part):
    case = SideCase(items=6, layers=4)
    if part in ("table", "rows"):
        case.states = [view._replace(**{part: strided(getattr(view, part))}) for view in case.states]
    else:
        case.towers = [tower._replace(**{part: strided(getattr(tower, part))}) for tower in case.towers]
    for mine, exact in zip(
        by_gpu(case.states, case.towers), towers_reference.side_towers(case.states, case.towers), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_equal_calls_give_equal_bits():
    case = SideCase(items=17, layers=2)  # more than one tile of items
    for first, second in zip(case.run(by_gpu), case.run(by_gpu), strict=True):
        assert torch.equal(first, second)
