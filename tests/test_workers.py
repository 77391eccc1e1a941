"""Calls in worker processes where the machine refuses shared memory, processes or memory: none waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import worker_calls
from iisan_fast import workers
from iisan_fast.errors import InputError
from iisan_fast.workers import calls_ahead

MODULES = (worker_calls.__name__,)  # the fork server imports torch once, not each worker


@pytest.fixture(autouse=True)
def said_anew():
    workers._say_once.cache_clear()


def test_results_without_room_in_shared_memory_take_a_file(caplog):
    results = list(calls_ahead(worker_calls.without_room, [1, 2, 3], 1, modules=MODULES))
    assert all(torch.equal(result, torch.arange(7)) for result in results) and len(results) == 3
    (message,) = caplog.messages
    assert message.startswith("/dev/shm has no room for the results of worker processes: they take files in /")


@pytest.mark.parametrize("takes_files", [False, True])
def test_a_packed_result_is_the_result(takes_files):
    calls = workers._Calls(worker_calls.batch_of, packs=True)
    calls.takes_files = takes_files
    packed = calls[5]
    assert torch.equal(packed.unpack()["inputs"], torch.full((3, 100_000), 5.0))
    assert len(packed.content) < 1000  # the tensor itself goes another way


def test_without_processes_this_one_does_the_work(monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "_try_semaphores", refuse)
    for _ in range(2):
        assert list(calls_ahead(abs, [-1, 2], 2)) == [1, 2]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(calls_ahead(os.listdir, ["nowhere"], 2))
    (message,) = caplog.messages
    assert message.startswith("no worker process can be started ([Errno 28] No space left on device")


def test_a_killed_worker_is_one_line_within_seconds():
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^a worker process failed \(killed by SIGKILL, as .* memory runs out\); run"):
        list(calls_ahead(worker_calls.killed, [1, 2], 1, modules=MODULES))
    assert time.monotonic() - start < 60


def test_memory_that_a_worker_is_refused_is_a_memory_error():
    calls = workers._Calls(worker_calls.beyond_memory, packs=True)
    with pytest.raises(MemoryError, match="allocate memory"):
        workers._unpacked(calls[1])


@pytest.mark.long
@pytest.mark.parametrize(("call", "error"), [(worker_calls.unsendable, Exception), (worker_calls.faulty, RuntimeError)])
def test_an_error_of_the_program_comes_out_with_its_traceback(call, error):
    with pytest.raises(error, match="in DataLoader worker process 0") as raised:
        list(calls_ahead(call, [1], 1))
    assert not isinstance(raised.value, InputError)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts")
@pytest.mark.parametrize("size", ["4k", "64k", "1m"])
def test_extraction_with_a_small_shared_memory(tmp_path, size):
    code = (
        "from helpers import worker_calls; from iisan_fast.workers import calls_ahead; "
        "print([int(r['inputs'].sum()) for r in calls_ahead(worker_calls.batch_of, [1, 2, 3, 4], 2)])"
    )
    mount = f"mount -t tmpfs -o size={size} none /dev/shm && exec timeout 100 '{sys.executable}' -c \"{code}\""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(["unshare", "-m", "sh", "-c", mount], env=environment, capture_output=True, text=True)
    assert result.stdout == "[300000, 600000, 900000, 1200000]\n" and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1 and "/dev/shm" in result.stderr
