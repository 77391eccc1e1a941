"""Large pieces of work on a CPU's cores: order of results, errors, and thread counts that are restored."""

from __future__ import annotations

import threading

import pytest
import torch

from iisan_fast import kernels
from iisan_fast.kernels import threads as cpu_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_parts():
    assert cpu_threads.at_once(lambda part: part * 2, [5, 1, 4, 2, 3], 2) == [10, 2, 8, 4, 6]


def test_parts_run_in_parallel_on_equal_shares_of_the_cores():
    both = threading.Barrier(2, timeout=20)

    def work(_: int) -> tuple[int, bool]:
        both.wait()  # raises BrokenBarrierError if the other does not come
        return torch.get_num_threads(), torch.is_grad_enabled()

    assert cpu_threads.at_once(work, [0, 1], 2) == [(1, False), (1, False)]


@pytest.mark.parametrize(
    ("threads", "count", "lengths"),
    [(2, 31, [31]), (2, 33, [16, 17]), (4, 33, [16, 17]), (4, 100, [25] * 4), (8, 0, [0]), (3, 50, [16, 17, 17])],
)
def test_rows_are_shared_by_as_many_cores_as_pay_off(threads, count, lengths):
    torch.set_num_threads(threads)
    shares = cpu_threads.shares(count)
    assert [length for _, length in shares] == lengths
    assert [start for start, _ in shares] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert len(cpu_threads.shares(count, 1)) == 1


def test_one_core_starts_no_threads():
    torch.set_num_threads(1)
    here = threading.get_ident()
    assert cpu_threads.at_once(lambda _: threading.get_ident(), [0, 1], 2) == [here, here]


def test_an_error_in_a_part_comes_out():
    def work(part: int) -> int:
        if part == 1:
            raise ValueError("part 1")
        return part

    with pytest.raises(ValueError, match="part 1"):
        cpu_threads.at_once(work, [0, 1], 2)
    assert cpu_threads.at_once(work, [0, 2], 2) == [0, 2]


def test_large_pieces_set_torch_to_one_thread_and_restore_it():
    assert cpu_threads.cores() == 2
    with kernels.in_large_pieces():
        assert torch.get_num_threads() == 1 and cpu_threads.cores() == 2
        with kernels.in_large_pieces():
            assert cpu_threads.cores() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2 and cpu_threads.cores() == 2
    with pytest.raises(ZeroDivisionError), kernels.in_large_pieces():
        _ = 1 / 0
    assert torch.get_num_threads() == 2
