"""Large pieces of work on a CPU's cores: order, errors, thread counts given back; and the product of two weights."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iisan_fast import kernels
from iisan_fast.kernels import reference
from iisan_fast.kernels import threads as host
from iisan_fast.kernels.cpu import fold_heads as fold_native
from iisan_fast.kernels.cpu import library as native
from iisan_fast.kernels.cpu import side_towers as side_network_native

needs_compiler = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "there is one")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_parts():
    assert host.at_once(lambda part: part * 2, [5, 1, 4, 2, 3], 2) == [10, 2, 8, 4, 6]


def test_parts_run_beside_each_other_each_on_its_share_of_the_cores():
    both = threading.Barrier(2, timeout=20)

    def work(_: int) -> tuple[int, bool]:
        both.wait()  # broken, an error, if the other does not come
        return torch.get_num_threads(), torch.is_grad_enabled()

    assert host.at_once(work, [0, 1], 2) == [(1, False), (1, False)]


@pytest.mark.parametrize(
    ("threads", "count", "lengths"),
    [(2, 31, [31]), (2, 33, [16, 17]), (4, 33, [16, 17]), (4, 100, [25] * 4), (8, 0, [0]), (3, 50, [16, 17, 17])],
)
def test_a_share_of_the_rows_for_each_core_that_is_worth_its_while(threads, count, lengths):
    torch.set_num_threads(threads)
    found = host.shares(count)
    assert [length for _, length in found] == lengths
    assert [start for start, _ in found] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert len(host.shares(count, 1)) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("towers", "items"), [(3, 276), (3, 33), (1, 200), (2, 77), (3, 1), (3, 0)])
@pytest.mark.parametrize("split", [False, True])
def test_every_item_of_every_tower_is_one_pieces(threads, towers, items, split):
    torch.set_num_threads(threads)
    rounds = side_network_native.rounds(towers, items, split)
    assert len(rounds) == (towers if split or not items else 1) and all(rounds)
    pieces = [piece for one in rounds for piece in one]
    for tower in range(towers):
        own = sorted((each.start, each.count) for each in pieces if each.tower == tower)
        assert [start for start, _ in own] == [sum(count for _, count in own[:i]) for i in range(len(own))]
        assert sum(count for _, count in own) == items
    if split:
        assert all(len({each.tower for each in one}) == 1 for one in rounds)
    elif items:
        sizes, most = [each.count for each in pieces], side_network_native.MOST_WORKERS
        workers = max(1, min(threads, most, towers * items // side_network_native.LEAST_ROWS))
        assert sizes == sorted(sizes, reverse=True) and sizes[0] <= -(-towers * items // workers)
        assert len(pieces) < workers + towers


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(64, 64, 768, 768), (16, 5, 37, 32), (32, 7, 1, 16), (16, 3, 200, 48)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_folding_in_cpp_is_the_products_and_their_gradients(dtype, tolerance, sizes, threads):
    torch.set_num_threads(threads)
    chains, upstream = random_chains(sizes, dtype)
    weights = [weight for chain in chains for weight in chain]
    assert fold_native.takes(chains)
    found = [each for pair in kernels.fold(chains, "native") for each in pair]
    expected = [each for chain in chains for each in reference.fold(chain)]
    assert isinstance(found[0].grad_fn, fold_native._Fold._backward_cls)
    ours, theirs = ([*each, *torch.autograd.grad(each, weights, upstream)] for each in (found, expected))
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).norm() <= tolerance * other.norm()


def random_chains(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[kernels.Chain], list[Tensor]]:
    """Two chains whose outer weights are parts of one, as the heads' are; gradients of what they come to, one of them
    not contiguous."""
    generator, (d, between, rows, width) = torch.Generator().manual_seed(0), sizes

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    chains = [
        kernels.Chain(outer, random(between, rows), random(between), random(rows, width), random(rows))
        for outer in random(d, 2 * between).chunk(2, dim=1)
    ]
    for chain in chains:
        for weight in chain:
            weight.requires_grad_()
    return chains, [random(d, width), random(d), random(width, d).T, random(1).expand(d)]


@needs_compiler
def test_folding_in_cpp_passes_gradcheck():
    chains, _ = random_chains((16, 2, 3, 16), torch.float64)
    weights = [weight for chain in chains for weight in chain]

    def fold(*own: Tensor) -> tuple[Tensor, ...]:
        return tuple(each for pair in kernels.fold(fold_native._chains(own), "native") for each in pair)

    assert torch.autograd.gradcheck(fold, weights)


def test_one_core_works_alone():
    torch.set_num_threads(1)
    here = threading.get_ident()
    assert host.at_once(lambda _: threading.get_ident(), [0, 1], 2) == [here, here]


def test_an_error_in_a_part_comes_out():
    def work(part: int) -> int:
        if part == 1:
            raise ValueError("part 1")
        return part

    with pytest.raises(ValueError, match="part 1"):
        host.at_once(work, [0, 1], 2)
    assert host.at_once(work, [0, 2], 2) == [0, 2]


def test_in_large_pieces_threads_are_kept_for_them_and_given_back():
    assert host.cores() == 2
    with kernels.in_large_pieces():
        assert torch.get_num_threads() == 1 and host.cores() == 2
        with kernels.in_large_pieces():
            assert host.cores() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2 and host.cores() == 2
    with pytest.raises(ZeroDivisionError), kernels.in_large_pieces():
        _ = 1 / 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_fold_is_the_product_and_its_gradients_are_right(columns, count, backend):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for hidden in range(2, 2 + count)
        for shape in ((3, 4), (4, hidden), (4,), (hidden, columns), (hidden,))
    ]
    x = torch.randn(6, columns, generator=generator, dtype=torch.float64)

    def fold(*weights):
        return [each for found in kernels.fold(fold_native._chains(weights), backend) for each in found]

    for (weight, bias), chain in zip(kernels.fold(fold_native._chains(weights), backend), fold_native._chains(weights)):
        outer, middle, middle_bias, inner, inner_bias = chain
        expected = F.linear(F.linear(F.linear(x, inner, inner_bias), middle, middle_bias), outer)
        torch.testing.assert_close(F.linear(x, weight, bias), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *own: tuple(fold(*own)), weights)
    with torch.inference_mode():
        assert torch.equal(fold(*weights)[-2], weights[-5] @ weights[-4] @ weights[-2])


def test_fold_refuses_what_cannot_be_multiplied():
    def chain(rows: int, constants: int) -> kernels.Chain:
        return kernels.Chain(
            torch.ones(2, 3), torch.ones(3, 5), torch.ones(3), torch.ones(rows, 2), torch.ones(constants)
        )

    for bad, message in (
        (chain(4, 4), "chains[1]: expected matrices that can be multiplied, found [[2, 3], [3, 5], [4, 2]]"),
        (chain(5, 4), "chains[1].inner_bias: expected [5], found [4]"),
    ):
        with pytest.raises(ValueError) as refused:
            kernels.fold([chain(5, 5), bad])
        assert str(refused.value) == message
