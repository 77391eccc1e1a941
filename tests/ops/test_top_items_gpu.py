"""The best items on a GPU: exactness, ties, repeatability and graphs.

The bodies of the checks take a device and sizes, so that the interpreter can run them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
from helpers.kernel_cases import TopCase, assert_best_items
from iisan_fast import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_a_gpu"),
]


def check_best(device: str, users: int, catalogue: int, d: int, count: int, precision: Precision) -> None:
    case = TopCase(users, catalogue, d, precision.dtype, device)
    case.queries.clamp_(-1, 1)
    case.items.clamp_(-1, 1)  # so that sums are exact in half precision too
    with precision.active(), nan_in_new_memory(), all_launched({"top_items"}):
        assert_best_items(case, count, "gpu")


@each_precision
@pytest.mark.parametrize(
    ("users", "catalogue", "d", "count"),
    [(1, 1, 64, 1), (1, 507, 32, 10), (63, 507, 128, 128), (507, 20_314, 64, 10), (3001, 2047, 32, 50)],
)
def test_best_items_equal_a_dense_sort(users, catalogue, d, count, precision):
    check_best("cuda", users, catalogue, d, count, precision)


@each_precision
def test_best_items_of_wide_rows(precision):
    check_best("cuda", 507, 2047, 192, 10, precision)


def check_equal_items_tie(device: str, users: int, catalogue: int, precision: Precision) -> None:
    """Check a catalogue that holds every item twice: the copies follow each other, the lower row first."""
    generator = torch.Generator(device).manual_seed(3)
    order = torch.randperm(2 * catalogue, generator=generator, device=device)
    vectors = torch.randn(catalogue, 64, generator=generator, device=device).to(precision.dtype)
    queries = torch.randn(users, 64, generator=generator, device=device).to(precision.dtype)
    nothing = torch.full((users, 1), -1, device=device)
    with precision.active():
        rows, values = kernels.top_items(queries, vectors.repeat(2, 1)[order], 20, nothing, form="gpu")
    first, second = rows[:, ::2], rows[:, 1::2]
    pairs = order[first] % catalogue == order[second] % catalogue
    assert pairs.double().mean() > 0.998  # two scores in a million are equal by chance
    assert torch.equal(values[:, ::2][pairs], values[:, 1::2][pairs]) and (first < second)[pairs].all()


@each_precision
@pytest.mark.parametrize(("users", "catalogue"), [(63, 253), (2100, 253)])
def test_equal_items_tie(users, catalogue, precision):
    check_equal_items_tie("cuda", users, catalogue, precision)


# Repeatability, graphs and operators


class SeededCase(TopCase):
    """A case whose scores are random, with the tensors that a graph reads."""

    def __init__(self, users: int, catalogue: int, device: str, dtype: torch.dtype, seed: int) -> None:
        """Replace the small integers by random numbers of this seed."""
        super().__init__(users, catalogue, 64, dtype, device)
        generator = torch.Generator(device).manual_seed(seed)
        self.queries, self.items = (
            torch.randn(rows.shape, generator=generator, device=device).to(dtype) for rows in (self.queries, self.items)
        )


def run_by_gpu(case: TopCase) -> Results:
    """Return rows and scores, in lists, as the checks take them."""
    rows, values = case.best(10, "gpu")
    return {"rows": [rows], "values": [values]}


def maker(size: tuple[int, int], dtype: torch.dtype) -> Callable[[int], SeededCase]:
    return lambda seed: SeededCase(*size, "cuda", dtype, seed)


each_size = pytest.mark.parametrize("size", [(63, 333), (3001, 2047)], ids=["small", "large"])


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
def test_compiled_best_items_equal_eager_ones(dtype):
    case = SeededCase(63, 507, "cuda", dtype, 0)
    added = case.added
    assert added is not None

    def best(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries, items, excluded, allowed, *entries = tensors
        return kernels.top_items(queries, items, 10, excluded, allowed, form="gpu", added=kernels.AddedScores(*entries))

    rows, values = compiled(best)(*case.tensors())
    assert_same({"rows": [rows], "values": [values]}, run_by_gpu(case))


def test_operators_are_registered_as_they_behave():
    check_registrations(lambda: run_by_gpu(SeededCase(21, 63, "cuda", torch.float32, 0)), "best_item_keys")


def test_auto_takes_the_gpu_and_the_environment_overrides(monkeypatch):
    case = TopCase(63, 295, 32, torch.float32, "cuda")
    with all_launched({"top_items"}):
        case.best(10, "auto")
    with all_launched(set()):
        case.best(200, "auto")
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    with all_launched(set()):
        case.best(10, "auto")
