"""The Triton kernels on a GPU: accuracy, repeatability, graphs, 64-bit offsets, memory, torch.compile and training.

A result is judged by the eager op's own error in the same precision: both see the same rounded inputs and weights, and
both are compared with the reference in fp64. The bodies take a device and sizes, so that the interpreter can run them.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import epoch_batches
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import States, Tower, reference
from iisan_fast.kernels.gpu import launch
from iisan_fast.states.feature_table import FeatureTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

GIB = 1 << 30
INTRA_AND_INTER = ((0,), (1,), (0, 1))
SIDE_KERNELS = {name for name in launch.CONFIGURATIONS if name.startswith("side_")}
LOSS_KERNELS = {name for name in launch.CONFIGURATIONS if name.startswith("loss_")}
KINK_MARGIN = 3e-5  # beyond the error of a bottleneck's input in fp32
TF32_EPS = 2**-10

Results = dict[str, list[Tensor]]  # outputs, and gradients by the name of what they belong to


@pytest.fixture(autouse=True, scope="module")
def compiled_kernels() -> None:
    """Interpreted kernels would pass these tests and say nothing about a GPU."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "run the GPU tests without TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    """Each test finds the GPU's memory free, and no backend named in the environment."""
    with unittest.mock.patch.dict(os.environ):
        os.environ.pop(kernels.BACKEND_VARIABLE, None)
        yield
    gc.collect()
    torch.cuda.empty_cache()


# Precision, and the error that it allows


@dataclass(frozen=True)
class Precision:
    """The dtype of inputs and weights, and how fp32 matrices are multiplied."""

    dtype: torch.dtype
    matmul: str = "highest"

    @property
    def is_tf32(self) -> bool:
        return self.matmul == "high"

    @contextmanager
    def active(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, "high"),
    "fp16": Precision(torch.float16),
    "bf16": Precision(torch.bfloat16),
}
each_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integers), so what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # warns of cuBLAS, whose settings are left alone
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """||result - exact|| / ||exact|| over all the tensors together; NaN where a result has any."""
    difference = sum((a.detach().double() - b.detach().double()).square().sum().item() for a, b in zip(results, exact))
    scale = sum(b.detach().double().square().sum().item() for b in exact)
    return (difference / scale) ** 0.5 if scale else difference**0.5


def assert_as_good(ours: Results, theirs: Results, exact: Results, precision: Precision, measured: bool = True) -> None:
    """Errors of at most twice the eager op's own, or 4 ulp of the dtype where that is larger.

    A few numbers (gates, losses of a row or two) do not average an error, so they may err as much as eager does on the
    worst of the others. In TF32 eager is a measure only where cuBLAS surely multiplies in TF32 (`measured`); elsewhere
    4 ulp of TF32 are allowed.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    eager = {name: relative_error(theirs[name], truth) for name, truth in exact.items()}
    is_large = {name: sum(value.numel() for value in truth) >= 1000 for name, truth in exact.items()}
    worst = max((eager[name] for name in exact if is_large[name]), default=0.0)
    floor = 4 * (torch.finfo(precision.dtype).eps if measured or not precision.is_tf32 else TF32_EPS)
    lines, are_good = [], True
    for name, truth in exact.items():
        assert [value.shape for value in ours[name]] == [value.shape for value in truth], name
        error = relative_error(ours[name], truth)
        allowed = max(2 * (eager[name] if is_large[name] else max(eager[name], worst)), floor)
        are_good &= error <= allowed
        lines.append(f"{name}: error {error:.2e}, eager {eager[name]:.2e}, allowed {allowed:.2e}")
    assert are_good, "\n" + "\n".join(lines)


def assert_close(results: Results, expected: Results, rtol: float) -> None:
    """Every entry within `rtol` of the expected one, by norms."""
    assert results.keys() == expected.keys()
    errors = {name: relative_error(results[name], expected[name]) for name in expected}
    assert all(error <= rtol for error in errors.values()), errors


def assert_same(results: Results, expected: Results, context: str = "") -> None:
    """Bit for bit."""
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        for i, (result, value) in enumerate(zip(results[name], values, strict=True)):
            assert torch.equal(result, value), f"{name}[{i}] differs{context}"


@contextmanager
def all_launched(expected: set[str]) -> Iterator[None]:
    """Fails unless just these kernels were launched, each at least once."""
    launch.launches.clear()
    yield
    assert set(launch.launches) == expected


# Side towers


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
    skipped: int = 0  # layers of the first view's table that stand before those read: a sliced view of the table
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
    """Arguments of `side_towers` and the gradients of what it returns."""

    states: list[States]
    towers: list[Tower]
    activation: str
    gradients: list[Tensor]

    def to(self, dtype: torch.dtype) -> TowerInputs:
        """The same numbers in another dtype."""
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
    """Random states and parameters for which the bottlenecks weigh about as much as the states.

    Where a ReLU's input is so close to 0 that rounding alone decides its side, no gradient enters: the item's output
    gradient is 0.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    rows = torch.randint(0, case.items + 9, (case.items,), generator=generator, device=device)
    layers, width, bottleneck = case.layers, case.width, case.bottleneck
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
    """bool [N]: items none of whose bottlenecks has an input near 0."""
    nearest: list[Tensor] = []

    def relu(z: Tensor) -> Tensor:
        nearest.append(z.abs().amin(1))
        return z.relu()

    exact = inputs.to(torch.float64)
    with torch.no_grad(), unittest.mock.patch.dict(reference.ACTIVATIONS, relu=relu):
        reference.side_towers(exact.states, exact.towers)
    return torch.stack(nearest).amin(0) > KINK_MARGIN


def side_towers_by(backend: str) -> Callable[..., list[Tensor]]:
    return lambda states, towers, activation: kernels.side_towers(states, towers, activation, backend=backend)


def run_towers(op: Callable[..., list[Tensor]], inputs: TowerInputs) -> Results:
    """Outputs, and the gradients of all parameters and of views read in order; the inputs stay as they are."""

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
    found = iter(gradients)
    named = {name: [next(found) for _ in values] for name, values in leaves.items() if values}
    return {"outputs": [output.detach() for output in outputs], **named}


def launched_by(case: TowerCase) -> set[str]:
    """The kernels that a forward and a backward with every gradient need."""
    return SIDE_KERNELS if case.gated or case.dense else SIDE_KERNELS - {"side_mix_gradients"}


def check_towers(device: str, case: TowerCase, precision: Precision) -> None:
    if precision.is_tf32:
        case = dataclasses.replace(case, items=-(-case.items // 64) * 64)
    inputs = make_towers(case, device, precision.dtype)
    exact = run_towers(reference.side_towers, inputs.to(torch.float64))
    with precision.active():
        theirs = run_towers(reference.side_towers, inputs)
        with nan_in_new_memory(), all_launched(launched_by(case)):
            ours = run_towers(side_towers_by("triton"), inputs)
    assert_as_good(ours, theirs, exact, precision, measured=case.bottleneck % 64 == 0)


@each_precision
@pytest.mark.parametrize("case", TOWER_CASES.values(), ids=TOWER_CASES.keys())
def test_side_towers_err_as_little_as_eager(case, precision):
    check_towers("cuda", case, precision)


def check_half_tables(device: str, case: TowerCase, dtype: torch.dtype) -> None:
    """As training has it: tables of bf16 or fp16, weights of fp32. Eager is judged with all of it in the half dtype."""
    inputs = make_towers(case, device, torch.float32)
    halved = inputs.to(dtype)
    states = [half if half.rows is not None else full for half, full in zip(halved.states, inputs.states)]
    inputs = dataclasses.replace(inputs, states=states, gradients=halved.gradients)
    exact = run_towers(reference.side_towers, inputs.to(torch.float64))
    theirs = run_towers(reference.side_towers, halved)
    with nan_in_new_memory():
        ours = run_towers(side_towers_by("triton"), inputs)
    assert all(value.dtype == torch.float32 for values in ours.values() for value in values)
    assert_as_good(ours, theirs, exact, Precision(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["iisan", "iisan, many items", "versa", "aligned, inter"])
def test_half_tables_under_fp32_weights_err_as_little_as_eager(name, dtype):
    check_half_tables("cuda", TOWER_CASES[name], dtype)


def check_after_inference(device: str) -> None:
    """What an evaluation leaves behind, made without gradients, does not stand in training's way."""
    inputs = make_towers(TowerCase(items=7, layers=5, width=32, bottleneck=16), device, torch.float32)
    with torch.inference_mode():
        side_towers_by("triton")(inputs.states, inputs.towers, inputs.activation)
    run_towers(side_towers_by("triton"), inputs)


def test_training_may_follow_inference():
    check_after_inference("cuda")


# In-batch cross-entropy


@dataclass(frozen=True)
class LossCase:
    """The shape of a call of `inbatch_cross_entropy`."""

    rows: int
    columns: int
    d: int = 64
    masked: bool = True
    debiased: bool = True
    reduction: str = "none"


LOSS_CASES = [
    LossCase(1, 63),
    LossCase(1, 507, masked=False),
    LossCase(63, 507, d=32),
    LossCase(507, 63, d=128),
    LossCase(507, 63, masked=False, debiased=False),
    LossCase(512, 1024),
    LossCase(512, 1024, d=32, debiased=False, reduction="mean"),
    LossCase(2560, 1024, d=128, masked=False),
    LossCase(3001, 2047),
    LossCase(3001, 2047, d=32, reduction="mean"),
    LossCase(3001, 2047, d=128, debiased=False),
    LossCase(3001, 2047, masked=False, debiased=False, reduction="mean"),
    LossCase(3001, 2047, masked=False),
]


@dataclass(frozen=True)
class LossInputs:
    """Arguments of `inbatch_cross_entropy` and the gradient of what it returns."""

    queries: Tensor
    items: Tensor
    targets: Tensor
    masks: tuple[Tensor | None, Tensor | None]  # row_users, history_bits
    logs: tuple[Tensor | None, Tensor | None]  # log_multiplicity, log_popularity
    reduction: str
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> LossInputs:
        """The same numbers in another dtype."""
        floats = {name: getattr(self, name).to(dtype) for name in ("queries", "items", "gradient")}
        logs = tuple(None if value is None else value.to(dtype) for value in self.logs)
        return dataclasses.replace(self, **floats, logs=logs)

    def tensors(self) -> list[Tensor]:
        values = [self.queries, self.items, self.targets, *self.masks, *self.logs, self.gradient]
        return [value for value in values if value is not None]


def make_loss(case: LossCase, device: str, dtype: torch.dtype, seed: int = 0) -> LossInputs:
    """Scores of standard deviation 2; some users own every item, the first half or the last half of them."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    targets = numbers(0, case.columns, case.rows)
    std = 2**0.5 / case.d**0.25
    return LossInputs(
        queries=random(case.rows, case.d, std=std),
        items=random(case.columns, case.d, std=std),
        targets=targets,
        masks=_histories(case, targets, numbers) if case.masked else (None, None),
        logs=(
            numbers(1, 6, case.columns).double().log().to(dtype),
            (numbers(1, 60, case.columns).double() / 1000).log().to(dtype),
        )
        if case.debiased
        else (None, None),
        reduction=case.reduction,
        gradient=random(case.rows) if case.reduction == "none" else torch.ones((), dtype=dtype, device=device),
    )


def _histories(case: LossCase, targets: Tensor, numbers: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(row_users, history_bits) of users with about four rows each; every target is its user's own."""
    users = max(1, case.rows // 4)
    row_users = numbers(0, users, case.rows).sort().values
    own = numbers(0, 50, users, -(-case.columns // 32) * 32) == 0
    if users >= 3:
        own[0], own[1, : case.columns // 2], own[2, case.columns // 2 :] = True, True, True
    own[row_users, targets] = True
    bits = torch.arange(32, device=targets.device)
    return row_users, (own.view(users, -1, 32).long() << bits).sum(2).to(torch.int32)


def loss_by(backend: str) -> Callable[..., Tensor]:
    return lambda *arguments: kernels.inbatch_cross_entropy(*arguments, backend=backend)


def run_loss(op: Callable[..., Tensor], inputs: LossInputs) -> Results:
    """The loss, and the gradients of queries and items; the inputs stay as they are."""
    queries, items = (value.detach().clone().requires_grad_() for value in (inputs.queries, inputs.items))
    loss = op(queries, items, inputs.targets, *inputs.masks, *inputs.logs, inputs.reduction)
    of_queries, of_items = torch.autograd.grad(loss, [queries, items], inputs.gradient.to(loss.dtype))
    return {"loss": [loss.detach()], "queries": [of_queries], "items": [of_items]}


def check_loss(device: str, case: LossCase, precision: Precision) -> None:
    inputs = make_loss(case, device, precision.dtype)
    exact = run_loss(loss_by("torch"), inputs.to(torch.float64))
    with precision.active():
        theirs = run_loss(loss_by("torch"), inputs)
        with nan_in_new_memory(), all_launched(LOSS_KERNELS):
            ours = run_loss(loss_by("triton"), inputs)
    assert_as_good(ours, theirs, exact, precision, measured=case.rows % 64 == case.columns % 64 == 0)


@each_precision
@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_loss_errs_as_little_as_eager(case, precision):
    check_loss("cuda", case, precision)


def check_only_column(device: str, rows: int, precision: Precision) -> None:
    """One item is the target of every row: the loss and its gradients are 0, but for the rounding of a logit."""
    for masked in (True, False):
        inputs = make_loss(LossCase(rows, 1, masked=masked, debiased=masked), device, precision.dtype)
        with precision.active(), nan_in_new_memory():
            results = run_loss(loss_by("triton"), inputs)
        assert results["loss"][0].abs().max() <= 1e-5
        for name in ("queries", "items"):
            assert results[name][0].abs().max() <= 1e-4 * rows**0.5, name


@each_precision
@pytest.mark.parametrize("rows", [1, 63, 3001])
def test_loss_of_a_single_item_is_zero(rows, precision):
    check_only_column("cuda", rows, precision)


# Target rank


@dataclass(frozen=True)
class RankInputs:
    """Arguments of `target_rank`."""

    queries: Tensor
    items: Tensor
    targets: Tensor
    excluded: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.queries, self.items, self.targets, self.excluded]


def make_ranks(users: int, catalogue: int, d: int, device: str, dtype: torch.dtype, seed: int = 0) -> RankInputs:
    """Small integers, exact in every dtype, whose scores tie often; some targets stand in their own history."""
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    targets, excluded = numbers(0, catalogue, users), numbers(-1, catalogue, users, 12)
    excluded[::3, 5] = excluded[::3, 4]
    excluded[1::7, 11] = targets[1::7]
    return RankInputs(numbers(-3, 4, users, d).to(dtype), numbers(-3, 4, catalogue, d).to(dtype), targets, excluded)


def run_ranks(op: Callable[..., tuple[Tensor, Tensor]], inputs: RankInputs) -> Results:
    masked, unmasked = op(*inputs.tensors())
    return {"masked": [masked], "unmasked": [unmasked]}


def ranks_by_triton(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.target_rank(*arguments, backend="triton")


def check_ranks(device: str, users: int, catalogue: int, d: int, precision: Precision) -> None:
    inputs = make_ranks(users, catalogue, d, device, precision.dtype)
    if users > 5:
        inputs.queries[5, 0] = float("inf")  # a score that is no number: no rank
    exact = reference.target_rank(inputs.queries.double(), inputs.items.double(), inputs.targets, inputs.excluded)
    with precision.active(), nan_in_new_memory(), all_launched({"target_rank"}):
        found = ranks_by_triton(*inputs.tensors())
    for ours, expected in zip(found, exact):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@each_precision
@pytest.mark.parametrize(
    ("users", "catalogue", "d"), [(1, 1, 64), (1, 507, 32), (63, 507, 128), (507, 20_314, 64), (3001, 2047, 32)]
)
def test_ranks_equal_the_references(users, catalogue, d, precision):
    check_ranks("cuda", users, catalogue, d, precision)


def check_equal_items_tie(device: str, users: int, catalogue: int, precision: Precision) -> None:
    """Every item stands in the catalogue twice: each target ties with its double, wherever that lies."""
    generator = torch.Generator(device).manual_seed(3)
    items = torch.randn(catalogue, 64, generator=generator, device=device).to(precision.dtype)
    order = torch.randperm(2 * catalogue, generator=generator, device=device)
    queries = torch.randn(users, 64, generator=generator, device=device).to(precision.dtype)
    targets = torch.randint(0, 2 * catalogue, (users,), generator=generator, device=device)
    with precision.active():
        _, ranks = ranks_by_triton(queries, items.repeat(2, 1)[order], targets, targets.new_full((users, 1), -1))
    assert (ranks % 1 == 0.5).double().mean() > 0.998  # two scores in a million are equal by chance


@each_precision
@pytest.mark.parametrize(("users", "catalogue"), [(63, 253), (2100, 253)])
def test_equal_items_tie(users, catalogue, precision):
    check_equal_items_tie("cuda", users, catalogue, precision)


# Repeatability and graphs


def calls(device: str, dtype: torch.dtype, towers: TowerCase, loss: LossCase, users: int) -> dict[str, tuple]:
    """Every op by name: how to make its inputs from a seed, and how to run it forward and backward."""
    return {
        "side_towers": (
            lambda seed: make_towers(towers, device, dtype, seed),
            lambda inputs: run_towers(side_towers_by("triton"), inputs),
        ),
        "inbatch_cross_entropy": (
            lambda seed: make_loss(loss, device, dtype, seed),
            lambda inputs: run_loss(loss_by("triton"), inputs),
        ),
        "target_rank": (
            lambda seed: make_ranks(users, loss.columns, loss.d, device, dtype, seed),
            lambda inputs: run_ranks(ranks_by_triton, inputs),
        ),
    }


OPS = ("side_towers", "inbatch_cross_entropy", "target_rank")
each_op = pytest.mark.parametrize("op", OPS)
SIZES = {
    "small": (TowerCase(items=257), LossCase(507, 333), 63),
    "large": (TowerCase(items=4097), LossCase(3001, 2047), 3001),
    "large, mean": (TowerCase(items=2500, reads=((0, 1),), dense=(1,)), LossCase(3001, 2047, reduction="mean"), 2100),
}
each_size = pytest.mark.parametrize("size", SIZES)


def check_repeats(make: Callable, run: Callable, times: int) -> None:
    inputs = make(0)
    first = run(inputs)
    device = inputs.tensors()[0].device
    for i in range(1, times):
        torch.full((1 << 22,), float("nan") if i % 2 else 1e30, device=device)  # what the next call's memory holds
        assert_same(run(inputs), first, f" in run {i}")


@each_op
@each_size
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_results_repeat_bit_for_bit(op, size, precision):
    chosen = PRECISIONS[precision]
    with chosen.active():
        check_repeats(*calls("cuda", chosen.dtype, *SIZES[size])[op], times=100)


@each_op
@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_follows_its_inputs(op, size, dtype):
    make, run = calls("cuda", dtype, *SIZES[size])[op]
    inputs = make(0)
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            run(inputs)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(inputs)
    for seed in (1, 2):
        fresh = make(seed)
        for captured, value in zip(inputs.tensors(), fresh.tensors(), strict=True):
            captured.copy_(value)
        graph.replay()
        assert_close(replayed, run(fresh), rtol=4 * torch.finfo(dtype).eps)


# Tables and results of more than 2^31 elements


def needs_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, found {free / GIB:.0f}")


def check_far_rows(device: str, table_rows: int, case: TowerCase, dtype: torch.dtype) -> None:
    """Rows at both ends of long tables give what a table of just those rows gives."""
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
        run_towers(side_towers_by("triton"), dataclasses.replace(inputs, states=states))
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
    """Of very many rows only the last have an output gradient: results and gradients are those of these rows alone."""
    inputs = make_towers(dataclasses.replace(case, items=last), device, dtype)
    rows = inputs.states[0].rows
    repeated = rows.repeat(-(-items // last))[-items:]
    gradients = [torch.zeros(items, case.width, dtype=dtype, device=device) for _ in inputs.towers]
    for gradient, of_last in zip(gradients, inputs.gradients):
        gradient[-last:] = of_last
    states = [States(view.table, repeated) for view in inputs.states]
    ours = run_towers(side_towers_by("triton"), dataclasses.replace(inputs, states=states, gradients=gradients))
    ours["outputs"] = [output[-last:] for output in ours["outputs"]]
    assert_close(ours, run_towers(side_towers_by("triton"), inputs), rtol=1e-5)


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


def extra_memory(function: Callable[[], Any]) -> int:
    """Bytes allocated at the peak of a call beyond those before it; a first call pays for workspaces."""
    function()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


CATALOGUE = TowerCase(items=12_900)  # the distinct items of 8,192 users of Scientific


def fp32_weights(inputs: TowerInputs) -> TowerInputs:
    """As in training: the tables stay as they are; parameters of fp32 that take a gradient."""
    towers = [_map_tower(lambda value: value.float().requires_grad_(), tower) for tower in inputs.towers]
    return dataclasses.replace(inputs, towers=towers, gradients=[value.float() for value in inputs.gradients])


def test_a_towers_forward_takes_less_than_one_gathered_view():
    case = dataclasses.replace(CATALOGUE, reads=((0, 1),))
    inputs = fp32_weights(make_towers(case, "cuda", torch.bfloat16))
    view = case.items * case.layers * case.width * 2
    used = extra_memory(lambda: side_towers_by("triton")(inputs.states, inputs.towers, "relu"))
    assert used < view, f"{used / 1e6:.0f} MB, a gathered view {view / 1e6:.0f} MB"


def test_three_towers_forward_holds_no_gathered_view():
    """Beyond what it returns, [T, N, D] in fp32, and its bottlenecks, there is no room for even half a view."""
    inputs = fp32_weights(make_towers(CATALOGUE, "cuda", torch.bfloat16))
    towers, items, width = len(CATALOGUE.reads), CATALOGUE.items, CATALOGUE.width
    outputs = towers * items * width * 4
    bottlenecks = towers * items * CATALOGUE.layers * CATALOGUE.bottleneck * (4 + 2 + 2)  # W_down p; z and a for later
    used = extra_memory(lambda: side_towers_by("triton")(inputs.states, inputs.towers, "relu"))
    others = used - outputs - bottlenecks
    view = items * CATALOGUE.layers * width * 2
    assert others < view / 2, f"{used / 1e6:.0f} MB, {others / 1e6:.0f} of it unaccounted for"


def test_towers_forward_and_backward_take_a_fraction_of_eagers_memory():
    needs_memory(30)
    inputs = fp32_weights(make_towers(CATALOGUE, "cuda", torch.bfloat16))
    eager = extra_memory(lambda: run_towers(side_towers_by("torch"), inputs))
    ours = extra_memory(lambda: run_towers(side_towers_by("triton"), inputs))
    assert ours < eager / 2, f"{ours / 1e6:.0f} MB, eager {eager / 1e6:.0f} MB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_takes_a_fiftieth_of_eagers_memory(dtype):
    needs_memory(40)
    inputs = make_loss(LossCase(30_800, 12_900, reduction="mean"), "cuda", dtype)
    eager = extra_memory(lambda: run_loss(loss_by("torch"), inputs))
    ours = extra_memory(lambda: run_loss(loss_by("triton"), inputs))
    assert ours < 0.02 * eager, f"{ours / 1e6:.1f} MB, eager {eager / 1e6:.0f} MB"
    assert ours < 30_800 * 12_900 * 4, "the logits would fit"


# torch.compile and the registrations


def check_compiled(device: str, dtype: torch.dtype, compiler: str, towers: TowerCase, loss: LossCase) -> None:
    """Compiled as one graph, every op gives what it gives uncompiled."""

    def compiled(op: Callable) -> Callable:
        torch._dynamo.reset()
        return torch.compile(op, fullgraph=True, backend=compiler)

    rtol = max(1e-5, 4 * torch.finfo(dtype).eps)
    inputs = make_towers(towers, device, dtype)
    op = side_towers_by("triton")
    assert_close(run_towers(compiled(op), inputs), run_towers(op, inputs), rtol)
    inputs = make_loss(loss, device, dtype)
    op = loss_by("triton")
    assert_close(run_loss(compiled(op), inputs), run_loss(op, inputs), rtol)
    inputs = make_ranks(63, 507, loss.d, device, dtype)
    assert_same(run_ranks(compiled(ranks_by_triton), inputs), run_ranks(ranks_by_triton, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "masked"),
    [("iisan", True), ("iisan, gelu, not gated", False), ("one view", True), ("aligned, inter", False)],
)
def test_compiled_ops_equal_eager_ones(name, masked, dtype):
    check_compiled("cuda", dtype, "inductor", TOWER_CASES[name], LossCase(507, 333, masked=masked, debiased=masked))


class OpRecorder(TorchDispatchMode):
    """Remembers the calls of this project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "iisan_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registrations(device: str, dtype: torch.dtype, towers: TowerCase, loss: LossCase) -> None:
    """torch.library.opcheck of every operator, with the arguments that the public ops give it."""

    def copy(needs_gradients: bool) -> Callable[[Any], Any]:
        return lambda value: (
            value.detach().clone().requires_grad_(needs_gradients and value.requires_grad)
            if isinstance(value, Tensor)
            else value
        )

    with OpRecorder() as recorder:
        run_towers(side_towers_by("triton"), make_towers(towers, device, dtype))
        run_loss(loss_by("triton"), make_loss(loss, device, dtype))
        run_ranks(ranks_by_triton, make_ranks(21, 63, loss.d, device, dtype))
    names = [func.name().removeprefix("iisan_fast::") for func, _ in recorder.calls]
    assert {"side_towers", "row_losses", "target_counts"} <= set(names)
    for name, (func, arguments) in zip(names, recorder.calls):
        torch.library.opcheck(func, tree_map(copy(not name.endswith("_backward")), arguments))


@pytest.mark.parametrize("dense", [(), (1,)], ids=["by row", "in order"])
@pytest.mark.parametrize("masked", [True, False])
def test_operators_are_registered_as_they_behave(dense, masked):
    towers = TowerCase(items=37, layers=3, width=96, bottleneck=16, dense=dense)
    check_registrations("cuda", torch.float32, towers, LossCase(63, 95, d=32, masked=masked, debiased=masked))


# Training


def toy_histories(users: int, items: int) -> Sequences:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 14, users)
    return make_sequences([rng.integers(1, items + 1, length).tolist() for length in lengths], items=items)


def loss_curve(
    device: str, table: FeatureTable, sequences: Sequences, config: ModelConfig, steps: int, batch_users: int = 64
) -> list[float]:
    """Losses of training from the beginning, dropout on, Adam with fp32 weights."""
    model = (
        side_recommender(table.shapes, config, sequences.max_inputs, sequences.popularity, seed=0).to(device).train()
    )
    table = FeatureTable(tuple(view.to(device) for view in table.views))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses: list[float] = []
    for epoch in range(steps):
        for batch in epoch_batches(sequences, batch_users, seed=0, epoch=epoch):
            if len(losses) == steps:
                return losses
            optimizer.zero_grad()
            batch = batch.to(torch.device(device))
            loss = model.loss(batch, table.read(batch.distinct))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def check_curve(
    device: str, config: ModelConfig, shapes: list[tuple[int, int]], dtype: torch.dtype, rtol: float
) -> None:
    sequences = toy_histories(users=256, items=600)
    table = random_table(shapes, 600, dtype=dtype)
    curves = {}
    for name in ("torch", "triton"):
        launch.launches.clear()
        with unittest.mock.patch.dict(os.environ, {kernels.BACKEND_VARIABLE: name}):
            curves[name] = loss_curve(device, table, sequences, config, steps=32)
        assert bool(launch.launches) == (name == "triton")
    assert np.mean(curves["torch"][-4:]) < np.mean(curves["torch"][:4])
    np.testing.assert_allclose(curves["triton"], curves["torch"], rtol=rtol)


# In fp32 the reference alone, run in fp64 instead, moves by up to 2e-5 over these steps (before larger learning rates
# let Adam magnify rounding without bound). With half tables the kernels round the operands of every product; rounding
# those of the reference's moved its curve by up to 1.4e-4.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("method", ["iisan", "iisan-versa"])
def test_training_follows_the_references_curve(method, dtype, rtol):
    shapes = [(7, 768), (7, 768)] if method == "iisan" else [(6, 768), (4, 384)]
    check_curve("cuda", ModelConfig(method=method), shapes, dtype, rtol)


# Which backend runs


@each_op
def test_auto_takes_triton_on_a_gpu_and_the_environment_overrides(op, monkeypatch):
    run = {
        "side_towers": lambda: run_towers(side_towers_by("auto"), make_towers(TowerCase(), "cuda", torch.bfloat16)),
        "inbatch_cross_entropy": lambda: run_loss(loss_by("auto"), make_loss(LossCase(63, 95), "cuda", torch.float32)),
        "target_rank": lambda: run_ranks(kernels.target_rank, make_ranks(63, 95, 32, "cuda", torch.float32)),
    }[op]
    expected = {"side_towers": SIDE_KERNELS, "inbatch_cross_entropy": LOSS_KERNELS, "target_rank": {"target_rank"}}[op]
    with all_launched(expected):
        run()
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "torch")
    with all_launched(set()):
        run()
