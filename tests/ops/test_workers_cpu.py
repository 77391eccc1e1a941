"""Calls on the C++ library's threads: each call runs once, also with several callers and after a fork."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.shared_calls import Number, Work, share_out
from iisan_fast.kernels.cpu import library
from iisan_fast.kernels.cpu import schedule as schedule_module
from iisan_fast.kernels.cpu.schedule import AT_ONCE, Schedule, Span

pytestmark = needs_compiler


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_call_runs_once(count, threads):
    calls = []
    share_out(lambda number: calls.append((number, threading.get_ident())) or 0, count, threads)
    assert Counter(number for number, _ in calls) == Counter(range(count))
    assert len({thread for _, thread in calls}) <= threads


def test_threads_run_in_parallel_also_after_they_have_slept():
    together = threading.Barrier(3, timeout=20)
    for _ in range(3):
        share_out(lambda _: together.wait() and 0, 3, 3)
        assert not together.broken  # as it is if a thread does not come
        time.sleep(0.01)  # longer than they stay awake


def test_one_thread_is_the_callers():
    threads = []
    share_out(lambda _: threads.append(threading.get_ident()) or 0, 5, 1)
    assert threads == [threading.get_ident()] * 5


def test_a_call_that_fails_is_reported_after_all_calls():
    calls = []
    with pytest.raises(MemoryError, match="lacks memory for this batch"):
        share_out(lambda number: calls.append(number) or number == 3, 9, 2)
    assert sorted(calls) == list(range(9))


def scheduled(work: Callable[[int], int], groups: list[tuple[int, list[int]]], threads: int) -> None:
    """Run groups of calls; a group has a number of calls and waits for the groups whose indices follow."""
    call = Work(lambda pointer: work(pointer[0]))
    schedule = Schedule(torch.float32)
    spans = []
    count = 0
    for size, after in groups:
        before = [spans[number] for number in after] or [AT_ONCE]
        numbers = [Number(count + i) for i in range(size)]
        spans.append(schedule.add(call, numbers, functools.reduce(Span.to, before)))
        count += size
    schedule.run(threads)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_calls_wait_for_their_predecessors(threads):
    groups = [(3, []), (2, [0]), (4, []), (1, [1]), (0, [3]), (5, [1, 2]), (1, [5])]
    began, ended = [], []

    def work(number: int) -> int:
        began.append((number, set(ended)))
        time.sleep(0.001 * (number * 7 % 4))
        ended.append(number)
        return 0

    starts = [0, 3, 5, 9, 10, 10, 15, 16]
    for _ in range(5):
        began.clear(), ended.clear()
        scheduled(work, groups, threads)
        assert sorted(number for number, _ in began) == list(range(16))
        for number, before in began:
            group = next(i for i in range(len(groups)) if starts[i] <= number < starts[i + 1])
            for other in groups[group][1]:
                assert before >= set(range(starts[other], starts[other + 1]))


def test_independent_calls_run_beside_one_that_others_wait_for():
    together = threading.Barrier(2, timeout=20)
    scheduled(lambda number: together.wait() and 0 if number in (0, 2) else 0, [(1, []), (1, []), (1, [])], 2)
    assert not together.broken


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_groups_that_wait_for_a_failed_call_are_left_out(threads):
    calls = []
    with pytest.raises(MemoryError):
        scheduled(lambda number: calls.append(number) or number == 1, [(2, []), (2, [0]), (2, [])], threads)
    assert sorted(calls) == [0, 1, 4, 5]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_beside_a_schedule_may_fail_or_share_out_calls(threads):
    """Check that calls that have begun end before the next step starts."""
    began = threading.Event()
    calls = []

    def work(number: int) -> int:
        began.set()
        time.sleep(0.01)
        calls.append(number)
        return 0

    call = Work(lambda pointer: work(pointer[0]))
    numbers = [Number(i) for i in range(6)]

    def meanwhile() -> None:
        assert threads == 1 or began.wait(20)
        share_out(lambda number: calls.append(10 + number) or 0, 3, threads)
        raise ZeroDivisionError

    for _ in range(3):
        began.clear(), calls.clear()
        schedule = Schedule(torch.float32)
        schedule.add(call, numbers)
        with pytest.raises(ZeroDivisionError):
            schedule.run(threads, meanwhile)
        assert sorted(calls) == [*range(6), 10, 11, 12]
    share_out(lambda number: 0, 4, threads)


def test_an_interrupt_as_calls_begin_lets_them_end(monkeypatch):
    calls = []
    compiled = library.library(torch.float32)

    class Interrupted:
        end = compiled.end

        @staticmethod
        def begin(*arguments) -> int:
            assert not compiled.begin(*arguments)
            raise KeyboardInterrupt

    def work(pointer) -> int:
        time.sleep(0.01)
        calls.append(pointer[0])
        return 0

    schedule = Schedule(torch.float32)
    schedule.add(Work(work), [Number(i) for i in range(6)])
    with monkeypatch.context() as patch:
        patch.setattr(schedule_module, "library", lambda dtype: Interrupted)
        with pytest.raises(KeyboardInterrupt):
            schedule.run(2)
    assert sorted(calls) == list(range(6))
    test_threads_run_in_parallel_also_after_they_have_slept()  # the workers are free again


def test_two_callers_at_the_same_time_both_get_all_their_calls():
    lock = threading.Lock()
    counts = Counter()

    def work(number: int) -> int:
        with lock:
            counts[number] += 1
        return 0

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(share_out, work, 20, 3) for _ in range(40)]:
            done.result(timeout=60)
    assert counts == Counter({number: 40 for number in range(20)})


@pytest.mark.slow
def test_a_forked_process_starts_new_threads():
    program = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "tests")
from helpers.shared_calls import share_out
share_out(lambda number: 0, 4, 2)
child = os.fork()
together = threading.Barrier(2, timeout=20)
share_out(lambda number: together.wait() and 0, 2, 2)
if not child:
    os._exit(together.broken)
assert os.waitpid(child, 0)[1] == 0 and not together.broken
print("both", flush=True)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=120)
    assert (done.stdout, done.returncode) == ("both\n", 0), done.stderr
