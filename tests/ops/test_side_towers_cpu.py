"""The side network's form for a CPU, in C++, against the reference: outputs and gradients.

In fp64 they agree to rounding. In fp32 a result is as good as the reference's when it errs at most eight times as much,
or a few units in the last place: sums in another order differ, wrong mathematics differs by a thousand times.
"""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.compiler import needs_compiler
from helpers.tower_cases import INTRA_AND_INTER, Case, assert_as_good, assert_equal, by_cpu, error
from iisan_fast.kernels.cpu import side_towers as side_towers_cpu
from iisan_fast.kernels.reference.side_towers import GATE_TEMPERATURE
from iisan_fast.kernels.reference.side_towers import side_towers as towers_reference
from iisan_fast.kernels.threads import equal_parts

UPSTREAMS = ("plain", "expanded", "transposed", "strided")
SATURATED = (20.0, -20.0, 20.0, 0.0, -20.0)  # sigmoid(200) is 1 and sigmoid(-200) is 0 to the last bit in fp32

pytestmark = [needs_compiler, pytest.mark.usefixtures("two_threads_and_nan_in_new_memory")]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_towers(data):
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3, 8]), label="cores"))
    kinds = data.draw(st.lists(st.sampled_from(INTRA_AND_INTER), min_size=1, max_size=3))
    activation = data.draw(st.sampled_from(["relu", "gelu"]))
    case = Case(
        items=data.draw(st.sampled_from([0, 1, 2, 7, 31, 32, 33, 50, 65])),
        layers=data.draw(st.integers(1, 4)),
        bottleneck=data.draw(st.sampled_from([1, 3, 8, 17])),
        width=data.draw(st.sampled_from([1, 5, 24, 33])),
        kinds=kinds,
        gated=data.draw(st.booleans()),
        activation=activation,
        in_order=data.draw(st.lists(st.sampled_from(sorted({view for kind in kinds for view in kind})), unique=True)),
        projected=data.draw(st.sampled_from([None, 1, 6])),
        upstream=data.draw(st.sampled_from(UPSTREAMS)),
        seed=data.draw(st.integers(0, 99)),
    )
    case.check(in_fp32=activation == "gelu")  # rarely, rounding moves a ReLU's input to the other side of 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_towers_without_gradients(data):
    """Encode as for a catalogue: bottlenecks of whole panels use the composites."""
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3, 8]), label="cores"))
    kinds = data.draw(st.lists(st.sampled_from(INTRA_AND_INTER), min_size=1, max_size=3))
    table_dtype = data.draw(st.sampled_from([None, torch.bfloat16]))
    case = Case(
        items=data.draw(st.sampled_from([0, 1, 7, 33, 65])),
        layers=data.draw(st.integers(1, 4)),
        bottleneck=data.draw(st.sampled_from([16, 32])),
        width=data.draw(st.sampled_from([1, 5, 24, 33, 112])),
        kinds=kinds,
        gated=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["relu", "gelu"])),
        in_order=data.draw(st.lists(st.sampled_from(sorted({view for kind in kinds for view in kind})), unique=True)),
        projected=data.draw(st.sampled_from([1, 6, 20])),
        table_dtypes=(table_dtype, table_dtype),
        seed=data.draw(st.integers(0, 99)),
    )
    names = [f"output {i}" for i in range(len(kinds))]
    actual, exact = (
        dict(zip(names, case.forward(op, torch.float64, wanted=())[0], strict=True))
        for op in (by_cpu, towers_reference)
    )
    assert_equal(actual, exact, rtol=1e-12)


@pytest.mark.parametrize("threads", [2, 5])
def test_towers_of_the_published_shape(threads):
    torch.set_num_threads(threads)
    Case(items=33, layers=7, bottleneck=64, width=768, projected=64).check()


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("projected", [None, 4])
def test_gradients_of_any_stride(upstream, projected):
    Case(upstream=upstream, projected=projected, in_order=[1]).check()


@pytest.mark.parametrize("kind", [(0,), (0, 1)])
@pytest.mark.parametrize("items", [5, 33])
def test_every_subset_of_gradients(kind, items):
    case = Case(items=items, layers=2, width=4, bottleneck=3, kinds=[kind], in_order=[0], projected=2)
    exact = case.run(towers_reference, torch.float64)
    for count in range(1, 1 + len(case.leaves)):
        for wanted in itertools.combinations(case.leaves, count):
            names = ["output 0", *(f"gradient of {name}" for name in wanted)]
            expected = {name: exact[name] for name in names}
            assert_equal(case.run(by_cpu, torch.float64, wanted), expected, rtol=1e-12)


def test_an_unused_output_adds_nothing_to_the_gradients():
    case = Case(kinds=[(0,), (0, 1)], in_order=[0])
    results = []
    for op in (by_cpu, towers_reference):
        outputs, leaves = case.forward(op, torch.float64)
        gradients = torch.autograd.grad(outputs[1].sum(), leaves.values(), allow_unused=True)
        results.append(
            {name: torch.zeros(()) if value is None else value for name, value in zip(leaves, gradients, strict=True)}
        )
    ours, exact = results
    assert all(not ours[name].any() for name in case.parameters if name.endswith("0"))
    used = [name for name in case.leaves if not name.endswith(" 0") or name.startswith("view")]
    assert_equal({name: ours[name] for name in used}, {name: exact[name] for name in used}, rtol=1e-12)


@pytest.mark.parametrize("kind", INTRA_AND_INTER)
@pytest.mark.parametrize("items", [9, 40])
def test_saturated_gates(kind, items):
    """Check gates of exactly 0 and 1: a state that they shut off has a gradient of exactly 0, and no NaN appears."""
    case = Case(items=items, layers=len(SATURATED), kinds=[kind], in_order=[kind[0]])
    case.parameters["gate 0"] = torch.tensor(SATURATED)
    weights = torch.sigmoid(case.parameters["gate 0"] / GATE_TEMPERATURE).tolist()
    assert set(weights) == {0.0, 0.5, 1.0}
    ours, theirs = (case.run(op) for op in (by_cpu, towers_reference))
    assert all(value.isfinite().all() for value in ours.values())
    assert_equal(ours, theirs, rtol=1e-5)
    gates = ours["gradient of gate 0"]
    assert [bool(gate) for gate in gates] == [weight == 0.5 for weight in weights]
    assert_as_good(ours, theirs, case.run(towers_reference, torch.float64))


@pytest.mark.parametrize("items", [6, 48])
def test_one_item_over_and_over(items):
    case = Case(items=items)
    case.rows[:] = 1
    case.check()
    for output in case.forward(by_cpu)[0]:
        assert (output[0] - output).abs().max() <= 1e-5 * output.abs().max()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, None), (None, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_tables_of_other_dtypes_than_the_weights(dtypes):
    in_order = [view for view, dtype in enumerate(dtypes) if dtype is None]
    Case(table_dtypes=dtypes, in_order=in_order, projected=3).check()


def test_a_gradient_has_the_dtype_of_its_view():
    case = Case(table_dtypes=(torch.bfloat16, None), in_order=[0])
    ours, theirs = (case.run(op) for op in (by_cpu, towers_reference))
    assert ours["gradient of view 0"].dtype == torch.bfloat16
    assert_equal(ours, theirs, rtol=2**-7)


@pytest.mark.parametrize("projected", [None, 4])
@pytest.mark.parametrize("items", [0, 7, 40])
@pytest.mark.parametrize("quietly", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_outputs_are_the_same(quietly, items, projected):
    """Compare within rounding: without gradients the composites add in another order."""
    case = Case(items=items, projected=projected, bottleneck=16)
    trained, _ = case.forward(by_cpu, torch.float64)
    with quietly():
        outputs, _ = case.forward(by_cpu, torch.float64)
    untrained, _ = case.forward(by_cpu, torch.float64, wanted=())
    for expected, *others in zip(trained, outputs, untrained, strict=True):
        assert expected.requires_grad
        for output in others:
            torch.testing.assert_close(output, expected.detach(), rtol=1e-12, atol=1e-13)
            assert not output.requires_grad


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("items", [512, 513, 1024, 1025, 2600])
def test_many_items_without_gradients_go_through_in_equal_parts(items, threads):
    """Check that an item has the same output bits at any place among the items."""
    torch.set_num_threads(threads)
    sizes = [part.stop - part.start for part in equal_parts(items, 512)]
    assert sum(sizes) == items and max(sizes) <= 512 and max(sizes) - min(sizes) <= 1
    assert len(sizes) % threads == 0
    case = Case(items=items, layers=2, bottleneck=16, width=64, projected=16)
    case.rows[torch.randperm(items, generator=case.generator)[: items // 2]] = 1
    with torch.no_grad():
        outputs, _ = case.forward(by_cpu, wanted=())
    trained, _ = case.forward(by_cpu)
    for output, expected in zip(outputs, trained, strict=True):
        assert len(output[case.rows == 1].unique(dim=0)) == 1
        assert error(output, expected) <= 1e-5 * expected.norm().item()


def test_training_may_follow_inference_over_its_tables():
    case = Case(bottleneck=16)
    exact = case.run(towers_reference, torch.float64)
    with torch.inference_mode():
        case.tables = {name: table.clone() for name, table in case.tables.items()}
        case.forward(by_cpu, wanted=())
    assert_as_good(case.run(by_cpu), case.run(towers_reference), exact)


@pytest.mark.parametrize("items", [1, 31, 32, 77])
def test_two_runs_are_equal_to_the_last_bit(items):
    case = Case(items=items, in_order=[1], projected=4)
    first, second = case.run(by_cpu), case.run(by_cpu)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_thread_and_two_nearly_agree():
    case = Case(items=101, in_order=[1], width=40, projected=4)
    both = case.run(by_cpu)
    torch.set_num_threads(1)
    assert_equal(case.run(by_cpu), both, rtol=1e-5)


@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (2, 1)])
def test_threads_may_change_between_forward_and_backward(forward, backward):
    case = Case(in_order=[0])
    torch.set_num_threads(forward)
    outputs, leaves = case.forward(by_cpu, torch.float64)
    torch.set_num_threads(backward)
    assert_equal(case.backward(outputs, leaves), case.run(towers_reference, torch.float64), rtol=1e-12)


def test_a_backward_in_another_thread():
    case = Case()
    results = {}
    outputs, leaves = case.forward(by_cpu, torch.float64)
    thread = threading.Thread(target=lambda: results.update(case.backward(outputs, leaves)))
    thread.start()
    thread.join()
    assert_equal(results, case.run(towers_reference, torch.float64), rtol=1e-12)


def test_forwards_that_no_backward_follows_and_backwards_in_any_order():
    case, other = Case(seed=1), Case(items=35, seed=2)
    exact = [one_case.run(towers_reference, torch.float64) for one_case in (case, other)]
    case.forward(by_cpu, torch.float64)
    first, second = (one_case.forward(by_cpu, torch.float64) for one_case in (case, other))
    other.forward(by_cpu, torch.float64)
    assert_equal(case.backward(*first, retain_graph=True), exact[0], rtol=1e-12)
    assert_equal(other.backward(*second), exact[1], rtol=1e-12)
    assert_equal(case.backward(*first), exact[0], rtol=1e-12)


def test_a_second_derivative_is_refused():
    outputs, leaves = Case().forward(by_cpu)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), leaves["up_bias 0"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_parameters_changed_before_the_backward_are_refused():
    case = Case(projected=3)
    for name in case.parameters:
        outputs, leaves = case.forward(by_cpu)
        with torch.no_grad():
            leaves[name] += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            case.backward(outputs, leaves)


def test_states_may_be_overwritten_before_the_backward():
    """Overwrite a table: the forward has copied its states, and its gradient does not depend on them."""
    case = Case(in_order=[0])
    exact = case.run(by_cpu)
    outputs, leaves = case.forward(by_cpu)
    with torch.no_grad():
        leaves["view 0"].fill_(7)
    results = case.backward(outputs, leaves)
    assert all(torch.equal(results[name], exact[name]) for name in exact)


@pytest.mark.parametrize("items", [2, 32])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("kind", "activation"), [((0,), "gelu"), ((0, 1), "relu"), ((0, 1), "gelu")])
def test_gradients_equal_finite_differences(kind, activation, gated, items):
    case = Case(items, 2, 2, 3, [kind], gated, activation, in_order=kind, projected=2, seed=4)
    leaves = [tensor.double().requires_grad_() for tensor in (*case.parameters.values(), *case.tables.values())]
    count = len(case.parameters)

    def towers(*tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(case.parameters, tensors[:count]))
        return tuple(by_cpu(*case.arguments(parameters, dict(zip(case.tables, tensors[count:])))))

    assert torch.autograd.gradcheck(towers, leaves, fast_mode=items > 2)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("towers", "items"), [(3, 276), (3, 33), (1, 200), (2, 77), (3, 1), (3, 0)])
@pytest.mark.parametrize("split", [False, True])
def test_every_item_of_every_tower_is_one_pieces(threads, towers, items, split):
    torch.set_num_threads(threads)
    rounds = side_towers_cpu.rounds(towers, items, split)
    assert len(rounds) == (towers if split or not items else 1) and all(rounds)
    pieces = [piece for one in rounds for piece in one]
    for tower in range(towers):
        ranges = sorted((piece.start, piece.count) for piece in pieces if piece.tower == tower)
        assert [start for start, _ in ranges] == [sum(count for _, count in ranges[:i]) for i in range(len(ranges))]
        assert sum(count for _, count in ranges) == items
    if split:
        assert all(len({piece.tower for piece in one}) == 1 for one in rounds)
    elif items:
        sizes = [piece.count for piece in pieces]
        most = side_towers_cpu.MOST_WORKERS
        workers = max(1, min(threads, most, towers * items // side_towers_cpu.LEAST_ROWS))
        assert sizes == sorted(sizes, reverse=True) and sizes[0] <= -(-towers * items // workers)
        assert len(pieces) < workers + towers
