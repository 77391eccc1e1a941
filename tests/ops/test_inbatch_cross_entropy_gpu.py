"""The in-batch loss on a GPU: accuracy, repeatability, graphs and memory.

The bodies of the checks take a device and sizes, so that the interpreter can run them.
"""

from __future__ import annotations

import dataclasses
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_a_gpu"),
]

LOSS_KERNELS = {"loss_forward", "loss_query_gradients", "loss_item_gradients"}


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
    """Arguments of `inbatch_cross_entropy` and the gradient of the losses that it returns."""

    queries: Tensor
    items: Tensor
    targets: Tensor
    masks: tuple[Tensor | None, Tensor | None]  # row_users, history_bits
    logs: tuple[Tensor | None, Tensor | None]  # log_multiplicity, log_popularity
    reduction: str
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> LossInputs:
        """Return the case with its tensors in another dtype."""
        floats = {name: getattr(self, name).to(dtype) for name in ("queries", "items", "gradient")}
        logs = tuple(None if value is None else value.to(dtype) for value in self.logs)
        return dataclasses.replace(self, **floats, logs=logs)

    def tensors(self) -> list[Tensor]:
        values = [self.queries, self.items, self.targets, *self.masks, *self.logs, self.gradient]
        return [value for value in values if value is not None]


def make_loss(case: LossCase, device: str, dtype: torch.dtype, seed: int = 0) -> LossInputs:
    """Return inputs with scores of standard deviation 2; three users have all items, the first and the last half."""
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
    """Return (row_users, history_bits) of users with about four rows each; every target is in its user's history."""
    users = max(1, case.rows // 4)
    row_users = numbers(0, users, case.rows).sort().values
    in_history = numbers(0, 50, users, -(-case.columns // 32) * 32) == 0
    if users >= 3:
        in_history[0], in_history[1, : case.columns // 2], in_history[2, case.columns // 2 :] = True, True, True
    in_history[row_users, targets] = True
    bits = torch.arange(32, device=targets.device)
    return row_users, (in_history.view(users, -1, 32).long() << bits).sum(2).to(torch.int32)


def loss_by(form: str) -> Callable[..., Tensor]:
    return lambda *arguments: kernels.inbatch_cross_entropy(*arguments, form=form)


def run_loss(op: Callable[..., Tensor], inputs: LossInputs) -> Results:
    """Return the loss and the gradients of queries and items; the inputs do not change."""
    queries, items = (value.detach().clone().requires_grad_() for value in (inputs.queries, inputs.items))
    loss = op(queries, items, inputs.targets, *inputs.masks, *inputs.logs, inputs.reduction)
    of_queries, of_items = torch.autograd.grad(loss, [queries, items], inputs.gradient.to(loss.dtype))
    return {"loss": [loss.detach()], "queries": [of_queries], "items": [of_items]}


def check_loss(device: str, case: LossCase, precision: Precision) -> None:
    inputs = make_loss(case, device, precision.dtype)
    exact = run_loss(loss_by("reference"), inputs.to(torch.float64))
    with precision.active():
        theirs = run_loss(loss_by("reference"), inputs)
        with nan_in_new_memory(), all_launched(LOSS_KERNELS):
            ours = run_loss(loss_by("gpu"), inputs)
    assert_as_good(ours, theirs, exact, precision, measured=case.rows % 64 == case.columns % 64 == 0)


@each_precision
@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_loss_errs_as_little_as_eager(case, precision):
    check_loss("cuda", case, precision)


def check_only_column(device: str, rows: int, precision: Precision) -> None:
    """Check that with one item, every row's target, loss and gradients are 0 up to the rounding of a logit."""
    for masked in (True, False):
        inputs = make_loss(LossCase(rows, 1, masked=masked, debiased=masked), device, precision.dtype)
        with precision.active(), nan_in_new_memory():
            results = run_loss(loss_by("gpu"), inputs)
        assert results["loss"][0].abs().max() <= 1e-5
        for name in ("queries", "items"):
            assert results[name][0].abs().max() <= 1e-4 * rows**0.5, name


@each_precision
@pytest.mark.parametrize("rows", [1, 63, 3001])
def test_loss_of_a_single_item_is_zero(rows, precision):
    check_only_column("cuda", rows, precision)


# Repeatability, graphs and operators


SIZES = {
    "small": LossCase(507, 333),
    "large": LossCase(3001, 2047),
    "large, mean": LossCase(3001, 2047, reduction="mean"),
}
each_size = pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
each_mask = pytest.mark.parametrize("masked", [True, False])


def maker(case: LossCase, dtype: torch.dtype) -> Callable[[int], LossInputs]:
    return lambda seed: make_loss(case, "cuda", dtype, seed)


def run_by_gpu(inputs: LossInputs) -> Results:
    return run_loss(loss_by("gpu"), inputs)


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


@each_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_loss_equals_the_eager_one(masked, dtype):
    inputs = make_loss(LossCase(507, 333, masked=masked, debiased=masked), "cuda", dtype)
    op = loss_by("gpu")
    assert_close(run_loss(compiled(op), inputs), run_loss(op, inputs), compiled_tolerance(dtype))


@each_mask
def test_operators_are_registered_as_they_behave(masked):
    inputs = make_loss(LossCase(63, 95, d=32, masked=masked, debiased=masked), "cuda", torch.float32)
    check_registrations(lambda: run_by_gpu(inputs), "row_losses")


def test_auto_takes_the_gpu_and_the_environment_overrides(monkeypatch):
    inputs = make_loss(LossCase(63, 95), "cuda", torch.float32)
    with all_launched(LOSS_KERNELS):
        run_loss(loss_by("auto"), inputs)
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    with all_launched(set()):
        run_loss(loss_by("auto"), inputs)


# Peak memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_takes_a_fiftieth_of_eagers_memory(dtype):
    needs_memory(40)
    inputs = make_loss(LossCase(30_800, 12_900, reduction="mean"), "cuda", dtype)
    eager = extra_memory(lambda: run_loss(loss_by("reference"), inputs))
    ours = extra_memory(lambda: run_loss(loss_by("gpu"), inputs))
    assert ours < 0.02 * eager, f"{ours / 1e6:.1f} MB, eager {eager / 1e6:.0f} MB"
    assert ours < 30_800 * 12_900 * 4, "the logits would fit"
