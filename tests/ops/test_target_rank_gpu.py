"""The rank of a target on a GPU: exactness, ties, repeatability and graphs.

The bodies of the checks take a device and sizes, so that the interpreter can run them.
"""

from __future__ import annotations

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
    assert_same,
    check_captured_graph,
    check_registrations,
    check_repeats,
    compiled,
    each_precision,
    nan_in_new_memory,
)
from helpers.kernel_cases import added_case, assert_copies_tie, tied_case
from iisan_fast import kernels
from iisan_fast.kernels import AddedScores
from iisan_fast.kernels.reference import target_rank as target_rank_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_a_gpu"),
]


@dataclass(frozen=True)
class RankInputs:
    """Arguments of `target_rank`."""

    queries: Tensor
    items: Tensor
    targets: Tensor
    excluded: Tensor
    added: AddedScores

    def tensors(self) -> list[Tensor]:
        return [self.queries, self.items, self.targets, self.excluded, *self.added]


def make_ranks(users: int, catalogue: int, d: int, device: str, dtype: torch.dtype, seed: int = 0) -> RankInputs:
    """Return inputs of small integers, exact in every dtype, with many ties; some targets are in their history."""
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    targets, excluded = numbers(0, catalogue, users), numbers(-1, catalogue, users, 12)
    excluded[::3, 5] = excluded[::3, 4]
    excluded[1::7, 11] = targets[1::7]
    queries, items = numbers(-3, 4, users, d).to(dtype), numbers(-3, 4, catalogue, d).to(dtype)
    return RankInputs(queries, items, targets, excluded, added_case(targets, excluded, catalogue, dtype))


def run_ranks(op: Callable[..., tuple[Tensor, Tensor]], inputs: RankInputs) -> Results:
    """Return the ranks without and with added scores."""
    *tensors, offsets, items, values = inputs.tensors()
    masked, unmasked = zip(op(*tensors), op(*tensors, added=AddedScores(offsets, items, values)))
    return {"masked": [*masked], "unmasked": [*unmasked]}


def ranks_by_gpu(*arguments: Tensor, added: AddedScores | None = None) -> tuple[Tensor, Tensor]:
    return kernels.target_rank(*arguments, form="gpu", added=added)


def check_ranks(device: str, users: int, catalogue: int, d: int, precision: Precision) -> None:
    inputs = make_ranks(users, catalogue, d, device, precision.dtype)
    if users > 5:
        inputs.queries[5, 0] = float("inf")  # a NaN score has no rank
    values = inputs.added.values.double()
    doubles = inputs.queries.double(), inputs.items.double(), inputs.targets, inputs.excluded
    exact = run_ranks(target_rank_reference.target_rank, RankInputs(*doubles, inputs.added._replace(values=values)))
    with precision.active(), nan_in_new_memory(), all_launched({"target_rank", "target_rank_added"}):
        ranks = run_ranks(ranks_by_gpu, inputs)
    for name, expected in exact.items():
        torch.testing.assert_close(ranks[name], expected, rtol=0, atol=0, equal_nan=True)


@each_precision
@pytest.mark.parametrize(
    ("users", "catalogue", "d"),
    [(1, 1, 64), (1, 507, 32), (63, 507, 128), (507, 20_314, 64), (3001, 2047, 32), (507, 2047, 192)],
)
def test_ranks_equal_the_references(users, catalogue, d, precision):
    check_ranks("cuda", users, catalogue, d, precision)


def check_equal_items_tie(device: str, users: int, catalogue: int, precision: Precision) -> None:
    """Check a catalogue that holds every item twice: each target ties with its copy at any place."""
    generator = torch.Generator(device).manual_seed(3)
    items = torch.randn(catalogue, 64, generator=generator, device=device).to(precision.dtype)
    order = torch.randperm(2 * catalogue, generator=generator, device=device)
    queries = torch.randn(users, 64, generator=generator, device=device).to(precision.dtype)
    targets = torch.randint(0, 2 * catalogue, (users,), generator=generator, device=device)
    with precision.active():
        _, ranks = ranks_by_gpu(queries, items.repeat(2, 1)[order], targets, targets.new_full((users, 1), -1))
    assert (ranks % 1 == 0.5).double().mean() > 0.998  # two scores in a million are equal by chance


@each_precision
@pytest.mark.parametrize(("users", "catalogue"), [(63, 253), (2100, 253)])
def test_equal_items_tie(users, catalogue, precision):
    check_equal_items_tie("cuda", users, catalogue, precision)


@each_precision
@pytest.mark.parametrize(("users", "catalogue"), [(63, 253), (2100, 253)])
def test_equal_items_with_equal_added_scores_tie(users, catalogue, precision):
    with precision.active():
        assert_copies_tie(tied_case(users, catalogue, precision.dtype, "cuda"), "gpu")


# Repeatability, graphs and operators


SIZES = {"small": (63, 333), "large": (3001, 2047), "medium": (2100, 2047)}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def maker(size: tuple[int, int], dtype: torch.dtype) -> Callable[[int], RankInputs]:
    return lambda seed: make_ranks(*size, 64, "cuda", dtype, seed)


def run_by_gpu(inputs: RankInputs) -> Results:
    return run_ranks(ranks_by_gpu, inputs)


@each_size
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_results_repeat_bit_for_bit(size, precision):
    chosen = PRECISIONS[precision]
    with chosen.active():
        check_repeats(maker(size, chosen.dtype), run_by_gpu, times=100)


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_follows_its_inputs(size, dtype):
    check_captured_graph(maker(size, dtype), run_by_gpu, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_ranks_equal_eager_ones(dtype):
    inputs = make_ranks(63, 507, 64, "cuda", dtype)
    assert_same(run_ranks(compiled(ranks_by_gpu), inputs), run_by_gpu(inputs))


def test_operators_are_registered_as_they_behave():
    for name in ("target_counts", "target_count_corrections"):
        check_registrations(lambda: run_by_gpu(make_ranks(21, 63, 32, "cuda", torch.float32)), name)


def test_auto_takes_the_gpu_and_the_environment_overrides(monkeypatch):
    inputs = make_ranks(63, 95, 32, "cuda", torch.float32)
    with all_launched({"target_rank", "target_rank_added"}):
        run_ranks(kernels.target_rank, inputs)
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    with all_launched(set()):
        run_ranks(kernels.target_rank, inputs)
