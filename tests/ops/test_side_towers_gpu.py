"""The towers of a side network on a GPU: accuracy, repeatability, graphs, 64-bit offsets and memory.

The bodies of the checks take a device and sizes, so that the interpreter can run them.
"""

from __future__ import annotations

import dataclasses
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from helpers.gpu_checks import (
    PRECISIONS,
    Precision,
    Results,
    all_launched,
    assert_as_good,
    assert_close,
    assert_same,
    check_captured_graph,
    check_registrations,
    check_repeats,
    compiled,
    compiled_tolerance,
    each_precision,
    extra_memory,
    nan_in_new_memory,
    needs_memory,
)
from iisan_fast import kernels
from iisan_fast.kernels import States, Tower
from iisan_fast.kernels.gpu.configurations import CONFIGURATIONS
from iisan_fast.kernels.reference import side_towers as side_towers_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_a_gpu"),
]

INTRA_AND_INTER = ((0,), (1,), (0, 1))
SIDE_KERNELS = {name for name in CONFIGURATIONS if name.startswith("side_")}
KINK_MARGIN = 3e-5  # beyond the error of a bottleneck's input in fp32


@dataclass(frozen=True)
class TowerCase:
    """The shape of a call of `side_towers`."""

    items: int = 2047
    layers: int = 7
    width: int = 768
    bottleneck: int = 64
    reads: tuple[tuple[int, ...], ...] = INTRA_AND_INTER
    activation: str = "relu"
    gated: bool = True
    skipped: int = 0  # layers that the first view's table has before those read: the op reads a slice of it
    dense: tuple[int, ...] = ()  # views read in order, which take a gradient


# Rounding turns a ReLU on or off now and then, in eager as in the kernels. Only over many do the two errors compare, so
# the cases with a ReLU have many items.
TOWER_CASES = {
    "iisan": TowerCase(),
    "iisan, many items": TowerCase(items=2500),
    "iisan, one item": TowerCase(items=1, activation="gelu"),
    "iisan, gelu, not gated": TowerCase(items=507, activation="gelu", gated=False),
    "versa": TowerCase(items=257, layers=4, width=384, activation="gelu"),
    "versa, many items, not gated": TowerCase(items=2500, layers=4, width=384, gated=False),
    "width 1024": TowerCase(items=63, width=1024, activation="gelu"),
    "width 1152": TowerCase(width=1152),
    "width 4096": TowerCase(width=4096),
    "bottleneck 8": TowerCase(items=257, bottleneck=8, activation="gelu"),
    "bottleneck 48": TowerCase(bottleneck=48),
    "bottleneck 512": TowerCase(bottleneck=512),
    "one view": TowerCase(reads=((0,),)),
    "one view, in order": TowerCase(items=507, reads=((0,),), activation="gelu", dense=(0,)),
    "unequal depth, inter": TowerCase(layers=4, reads=((0, 1),), skipped=3),
    "aligned, inter": TowerCase(layers=4, reads=((0, 1),), skipped=3, dense=(1,)),
    "aligned, gelu, many items": TowerCase(items=2500, reads=((0, 1),), activation="gelu", dense=(1,)),
}


@dataclass(frozen=True)
class TowerInputs:
    """Arguments of `side_towers` and the gradients of the vectors that it returns."""

    states: list[States]
    towers: list[Tower]
    activation: str
    gradients: list[Tensor]

    def to(self, dtype: torch.dtype) -> TowerInputs:
        """Return the case with its tensors in another dtype."""
        states = [States(view.table.to(dtype), view.rows) for view in self.states]
        towers = [_map_tower(lambda value: value.to(dtype), tower) for tower in self.towers]
        return TowerInputs(states, towers, self.activation, [gradient.to(dtype) for gradient in self.gradients])

    def tensors(self) -> list[Tensor]:
        parameters = [value for tower in self.towers for value in tower[1:]]
        values = [*(value for view in self.states for value in view), *parameters, *self.gradients]
        return [value for value in values if value is not None]


def _map_tower(function: Callable[[Tensor], Tensor], tower: Tower) -> Tower:
    return Tower(tower.views, *(None if value is None else function(value) for value in tower[1:]))


def make_towers(case: TowerCase, device: str, dtype: torch.dtype, seed: int = 0) -> TowerInputs:
    """Return random states and parameters for which bottlenecks and states contribute about equally.

    Where a ReLU's input is so close to 0 that rounding alone decides its side, no gradient enters: the item's output
    gradient is 0.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    rows = torch.randint(0, case.items + 9, (case.items,), generator=generator, device=device)
    layers = case.layers
    width = case.width
    bottleneck = case.bottleneck
    states = []
    for view in range(1 + max(map(max, case.reads))):
        if view in case.dense:
            states.append(States(random(case.items, layers, width)))
        else:
            skipped = case.skipped if view == 0 else 0
            states.append(States(random(case.items + 9, skipped + layers, width)[:, skipped:], rows))
    towers = [
        Tower(
            views,
            random(layers, std=0.05) if case.gated else None,
            random(layers, bottleneck, width, std=width**-0.5),
            random(layers, bottleneck, std=0.1),
            random(layers, width, bottleneck, std=0.5 * bottleneck**-0.5),
            random(layers, width, std=0.1),
        )
        for views in case.reads
    ]
    gradients = [random(case.items, width) for _ in towers]
    inputs = TowerInputs(states, towers, case.activation, gradients)
    if case.activation == "gelu":
        return inputs
    is_clear = _clear_of_kinks(inputs)
    return dataclasses.replace(inputs, gradients=[gradient * is_clear[:, None] for gradient in gradients])


def _clear_of_kinks(inputs: TowerInputs) -> Tensor:
    """Return bool [N]: True for items whose bottleneck inputs are all away from 0."""
    nearest: list[Tensor] = []

    def relu(z: Tensor) -> Tensor:
        nearest.append(z.abs().amin(1))
        return z.relu()

    exact = inputs.to(torch.float64)
    with torch.no_grad(), unittest.mock.patch.dict(side_towers_reference.ACTIVATION_FUNCTIONS, relu=relu):
        side_towers_reference.side_towers(exact.states, exact.towers)
    return torch.stack(nearest).amin(0) > KINK_MARGIN


def side_towers_by(form: str) -> Callable[..., list[Tensor]]:
    return lambda states, towers, activation: kernels.side_towers(states, towers, activation, form=form)


def run_towers(op: Callable[..., list[Tensor]], inputs: TowerInputs) -> Results:
    """Return outputs and the gradients of all parameters and of tables read in order; the inputs do not change."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    towers = [_map_tower(leaf, tower) for tower in inputs.towers]
    states = [States(leaf(table) if rows is None else table, rows) for table, rows in inputs.states]
    outputs = op(states, towers, inputs.activation)
    leaves = {name: [getattr(tower, name) for tower in towers] for name in Tower._fields[1:]}
    leaves["states"] = [table for table, rows in states if rows is None]
    leaves = {name: [value for value in values if value is not None] for name, values in leaves.items()}
    gradients = torch.autograd.grad(
        outputs,
        [value for values in leaves.values() for value in values],
        [gradient.to(output.dtype) for gradient, output in zip(inputs.gradients, outputs)],
    )
    remaining = iter(gradients)
    named = {name: [next(remaining) for _ in values] for name, values in leaves.items() if values}
    return {"outputs": [output.detach() for output in outputs], **named}


def launched_by(case: TowerCase) -> set[str]:
    """Return the names of the kernels that a forward and a backward with all gradients launch."""
    return SIDE_KERNELS if case.gated or case.dense else SIDE_KERNELS - {"side_mix_gradients"}


def check_towers(device: str, case: TowerCase, precision: Precision) -> None:
    if precision.is_tf32:
        case = dataclasses.replace(case, items=-(-case.items // 64) * 64)
    inputs = make_towers(case, device, precision.dtype)
    exact = run_towers(side_towers_reference.side_towers, inputs.to(torch.float64))
    with precision.active():
        theirs = run_towers(side_towers_reference.side_towers, inputs)
        with nan_in_new_memory(), all_launched(launched_by(case)):
            ours = run_towers(side_towers_by("gpu"), inputs)
    assert_as_good(ours, theirs, exact, precision, measured=case.bottleneck % 64 == 0)


@each_precision
@pytest.mark.parametrize("case", TOWER_CASES.values(), ids=TOWER_CASES.keys())
def test_side_towers_err_as_little_as_eager(case, precision):
    check_towers("cuda", case, precision)


def check_half_tables(device: str, case: TowerCase, dtype: torch.dtype) -> None:
    """Check tables of bf16 or fp16 with fp32 weights, as in training; eager runs entirely in the half dtype."""
    inputs = make_towers(case, device, torch.float32)
    halved = inputs.to(dtype)
    states = [half if half.rows is not None else full for half, full in zip(halved.states, inputs.states)]
    inputs = dataclasses.replace(inputs, states=states, gradients=halved.gradients)
    exact = run_towers(side_towers_reference.side_towers, inputs.to(torch.float64))
    theirs = run_towers(side_towers_reference.side_towers, halved)
    with nan_in_new_memory():
        ours = run_towers(side_towers_by("gpu"), inputs)
    assert all(value.dtype == torch.float32 for values in ours.values() for value in values)
    assert_as_good(ours, theirs, exact, Precision(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["iisan", "iisan, many items", "versa", "aligned, inter"])
def test_half_tables_under_fp32_weights_err_as_little_as_eager(name, dtype):
    check_half_tables("cuda", TOWER_CASES[name], dtype)


def check_after_inference(device: str) -> None:
    """Train after an evaluation: constants that it cached without gradients must not stop the training."""
    inputs = make_towers(TowerCase(items=7, layers=5, width=32, bottleneck=16), device, torch.float32)
    with torch.inference_mode():
        side_towers_by("gpu")(inputs.states, inputs.towers, inputs.activation)
    run_towers(side_towers_by("gpu"), inputs)


def test_training_may_follow_inference():
    check_after_inference("cuda")


# Repeatability, graphs and operators


SIZES = {
    "small": TowerCase(items=257),
    "large": TowerCase(items=4097),
    "large, a view in order": TowerCase(items=2500, reads=((0, 1),), dense=(1,)),
}
each_size = pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())


def maker(case: TowerCase, dtype: torch.dtype) -> Callable[[int], TowerInputs]:
    return lambda seed: make_towers(case, "cuda", dtype, seed)


def run_by_gpu(inputs: TowerInputs) -> Results:
    return run_towers(side_towers_by("gpu"), inputs)


@each_size
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_results_repeat_bit_for_bit(case, precision):
    chosen = PRECISIONS[precision]
    with chosen.active():
        check_repeats(maker(case, chosen.dtype), run_by_gpu, times=100)


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_follows_its_inputs(case, dtype):
    check_captured_graph(maker(case, dtype), run_by_gpu, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["iisan", "iisan, gelu, not gated", "one view", "aligned, inter"])
def test_compiled_towers_equal_eager_ones(name, dtype):
    inputs = make_towers(TOWER_CASES[name], "cuda", dtype)
    op = side_towers_by("gpu")
    assert_close(run_towers(compiled(op), inputs), run_towers(op, inputs), compiled_tolerance(dtype))


@pytest.mark.parametrize("dense", [(), (1,)], ids=["by row", "in order"])
def test_operators_are_registered_as_they_behave(dense):
    case = TowerCase(items=37, layers=3, width=96, bottleneck=16, dense=dense)
    check_registrations(lambda: run_by_gpu(make_towers(case, "cuda", torch.float32)), "side_towers")


def test_auto_takes_the_gpu_and_the_environment_overrides(monkeypatch):
    inputs = make_towers(TowerCase(), "cuda", torch.bfloat16)
    with all_launched(SIDE_KERNELS):
        run_towers(side_towers_by("auto"), inputs)
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    with all_launched(set()):
        run_towers(side_towers_by("auto"), inputs)


# Tables and results of more than 2^31 elements


def check_far_rows(device: str, table_rows: int, case: TowerCase, dtype: torch.dtype) -> None:
    """Check that rows at both ends of long tables give the same as a table of only those rows."""
    inputs = make_towers(case, device, dtype)
    near = case.items // 2
    rows = torch.cat([torch.arange(near), torch.arange(table_rows - (case.items - near), table_rows)]).to(device)
    first, second = (
        torch.zeros(table_rows, case.layers, case.width, dtype=dtype, device=device) for _ in inputs.states
    )
    short = [States(view.table[: case.items], torch.arange(case.items, device=device)) for view in inputs.states]
    for table, view in zip((first, second), short):
        table[rows] = view.table
    results = [
        run_towers(side_towers_by("gpu"), dataclasses.replace(inputs, states=states))
        for states in ([States(first, rows), States(second, rows)], short)
    ]
    assert_same(*results)


@pytest.mark.parametrize("items", [300, 2500])
def test_rows_beyond_2_to_the_31_elements_of_a_table(items):
    needs_memory(40)
    case = TowerCase(items=items, layers=21)
    rows = 133_153 + 1000
    assert rows * case.layers * case.width > 2**31
    check_far_rows("cuda", rows, case, torch.bfloat16)


def check_many_items(device: str, items: int, last: int, case: TowerCase, dtype: torch.dtype) -> None:
    """Check very many rows, of which only the last have an output gradient, against these rows alone."""
    inputs = make_towers(dataclasses.replace(case, items=last), device, dtype)
    rows = inputs.states[0].rows
    repeated = rows.repeat(-(-items // last))[-items:]
    gradients = [torch.zeros(items, case.width, dtype=dtype, device=device) for _ in inputs.towers]
    for gradient, of_last in zip(gradients, inputs.gradients):
        gradient[-last:] = of_last
    states = [States(view.table, repeated) for view in inputs.states]
    ours = run_towers(side_towers_by("gpu"), dataclasses.replace(inputs, states=states, gradients=gradients))
    ours["outputs"] = [output[-last:] for output in ours["outputs"]]
    assert_close(ours, run_towers(side_towers_by("gpu"), inputs), rtol=1e-5)


def test_results_of_more_than_2_to_the_31_elements():
    needs_memory(60)
    case = TowerCase(layers=1, bottleneck=16)
    items = 2**31 // (len(case.reads) * case.width) + 5000
    assert len(case.reads) * items * case.width > 2**31
    check_many_items("cuda", items, 4096, case, torch.float32)


def test_bottlenecks_of_more_than_2_to_the_31_elements():
    needs_memory(80)
    case = TowerCase(layers=7, width=64, bottleneck=512, reads=((0, 1),))
    items = 2**31 // (case.layers * case.bottleneck) + 5000
    assert len(case.reads) * items * case.layers * case.bottleneck > 2**31
    check_many_items("cuda", items, 4096, case, torch.float32)


# Peak memory


CATALOGUE = TowerCase(items=12_900)  # the distinct items of 8,192 users of Scientific


def fp32_weights(inputs: TowerInputs) -> TowerInputs:
    """Return the inputs as in training: unchanged tables, fp32 parameters that require gradients."""
    towers = [_map_tower(lambda value: value.float().requires_grad_(), tower) for tower in inputs.towers]
    return dataclasses.replace(inputs, towers=towers, gradients=[value.float() for value in inputs.gradients])


def test_a_towers_forward_takes_less_than_one_gathered_view():
    case = dataclasses.replace(CATALOGUE, reads=((0, 1),))
    inputs = fp32_weights(make_towers(case, "cuda", torch.bfloat16))
    view = case.items * case.layers * case.width * 2
    used = extra_memory(lambda: side_towers_by("gpu")(inputs.states, inputs.towers, "relu"))
    assert used < view, f"{used / 1e6:.0f} MB, a gathered view {view / 1e6:.0f} MB"


def test_three_towers_forward_holds_no_gathered_view():
    """The peak of memory is outputs and bottlenecks plus less than half a view."""
    inputs = fp32_weights(make_towers(CATALOGUE, "cuda", torch.bfloat16))
    towers = len(CATALOGUE.reads)
    items = CATALOGUE.items
    width = CATALOGUE.width
    outputs = towers * items * width * 4
    bottlenecks = (
        towers * items * CATALOGUE.layers * CATALOGUE.bottleneck * (4 + 2 + 2)
    )  # W_down p; z and a, kept for the backward
    used = extra_memory(lambda: side_towers_by("gpu")(inputs.states, inputs.towers, "relu"))
    others = used - outputs - bottlenecks
    view = items * CATALOGUE.layers * width * 2
    assert others < view / 2, f"{used / 1e6:.0f} MB, {others / 1e6:.0f} of it unaccounted for"


def test_towers_forward_and_backward_take_a_fraction_of_eagers_memory():
    needs_memory(30)
    inputs = fp32_weights(make_towers(CATALOGUE, "cuda", torch.bfloat16))
    eager = extra_memory(lambda: run_towers(side_towers_by("reference"), inputs))
    ours = extra_memory(lambda: run_towers(side_towers_by("gpu"), inputs))
    assert ours < eager / 2, f"{ours / 1e6:.0f} MB, eager {eager / 1e6:.0f} MB"
