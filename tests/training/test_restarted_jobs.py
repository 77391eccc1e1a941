"""A job that its launcher starts again, with the same command line, goes on with the run that it began."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from helpers.run_folders import assert_same_run
from iisan_fast import api
from iisan_fast.errors import InputError
from iisan_fast.training import job_runs
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.training_loop import TrainingLoop

SIZES = {"embedding_dim": 16, "bottleneck": 8, "batch_users": 16}


class Killed(BaseException):
    """Stands in for a process that is killed."""


def free_port() -> int:
    """Return a port of this machine that nothing uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def job(monkeypatch, tmp_path) -> Iterator[None]:
    """Hold a store as torchrun's agent does, for a job of one rank, in an empty folder."""
    store = TCPStore("127.0.0.1", 0, None, is_master=True)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    job_runs._calls.clear()
    yield
    job_runs._calls.clear()


def killed(target: type, name: str, run) -> None:
    """Call a function, in which a method kills the process at its first call."""

    def kill(*_) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(Killed):
            run()
    job_runs._calls.clear()  # of the process that is gone


@pytest.mark.parametrize("out", [None, "chosen"])
def test_a_run_of_the_job_goes_on_in_its_folder(toy_run, job, out, caplog):
    def run(**changes) -> dict:
        return api.train(*toy_run, out=out, epochs=2, device="cpu", **SIZES, **changes)

    folder = Path(out or "runs/toy-1")
    killed(TrainingLoop, "_test", run)
    assert load_checkpoint(folder / "last.safetensors")[1]["epoch"] == 2
    before = (folder / "last.safetensors").stat().st_mtime_ns
    with pytest.raises(
        InputError, match=f"{folder}: model.dropout: expected 0.1, as this job began the run, found 0.2"
    ):
        run(dropout=0.2)
    job_runs._calls.clear()
    result = run()
    assert result["run"] == str(folder) and (folder / "last.safetensors").stat().st_mtime_ns == before
    assert json.loads((folder / "test.json").read_text()) == {name: result[name] for name in result if name != "run"}
    job_runs._calls.clear()
    assert run() == result  # a job that is started again after its end
    other = api.train(*toy_run, out=None, epochs=1, device="cpu", **SIZES)
    assert other["run"] == ("runs/toy-2" if out is None else "runs/toy-1")  # the second run that the command asks for


def test_a_folder_without_a_run_yet_is_taken_again(toy_run, job):
    def run() -> dict:
        return api.train(*toy_run, epochs=1, device="cpu", **SIZES)

    killed(RunFolder, "_write_settings", run)
    assert run()["run"] == "runs/toy-1" and [path.name for path in Path("runs").iterdir()] == ["toy-1"]


def test_a_job_without_a_store_begins_another_run(toy_run, job, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")

    def run() -> dict:
        return api.train(*toy_run, epochs=1, device="cpu", **SIZES)

    killed(TrainingLoop, "_test", run)
    assert run()["run"] == "runs/toy-2"


def test_a_store_that_does_not_answer_is_one_line(toy_run, job, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr("iisan_fast.ranks.job_memory.SECONDS", 0.1)
    with pytest.raises(InputError, match=f"MASTER_ADDR, MASTER_PORT: the launcher's store .* at 127.0.0.1:{port} "):
        api.train(*toy_run, epochs=1, device="cpu", **SIZES)


@contextlib.contextmanager
def torchrun(folder: Path, *arguments: object, options: tuple[object, ...] = ()) -> Iterator[subprocess.Popen]:
    """Start a training by torchrun in a folder, with 2 ranks on this machine unless options say otherwise."""
    options = options or ("--standalone", "--nproc-per-node", 2)
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "iisan_fast", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        for rank in (process.pid, *ranks_of(process)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.wait()


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the process ids of the ranks that torchrun has started, in ascending order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, (path.parents[1] / "log").read_text()
        time.sleep(0.02)


def settings_of(toy_run) -> tuple[object, ...]:
    dataset, cache = toy_run
    sizes = ("--embedding-dim", 16, "--bottleneck", 8, "--batch-users", 4, "--patience", 400, "--epochs", 40)
    return dataset, "--cache", cache, *sizes, "--checkpoint-every", 7, "--device", "cpu"


@pytest.fixture(scope="module")
def undisturbed(toy_run, tmp_path_factory) -> Path:
    """Return the folder of a run on two ranks without a restart."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with torchrun(folder, *settings_of(toy_run)) as process:
        assert process.wait(200) == 0, (folder / "log").read_text()
    return folder / "runs" / "toy-1"


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_that_are_killed_are_started_again_and_the_run_is_the_same(toy_run, tmp_path, undisturbed, victim):
    run = tmp_path / "runs" / "toy-1"
    options = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 3)
    with torchrun(tmp_path, *settings_of(toy_run), options=options) as process:
        for name in ("last.safetensors", "metrics.jsonl"):
            wait_for(run / name, process)
            os.kill(ranks_of(process)[victim], signal.SIGKILL)
            time.sleep(2)
        assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert_same_run(run, undisturbed)
    assert (tmp_path / "log").read_text().count("is lost") == 2


@pytest.mark.long
def test_sigterm_to_torchrun_saves_the_run_which_goes_on_with_as_many_ranks(toy_run, tmp_path, undisturbed):
    run = tmp_path / "runs" / "toy-1"
    with torchrun(tmp_path, *settings_of(toy_run)) as process:
        wait_for(run / "metrics.jsonl", process)
        process.terminate()
        assert process.wait(60) != 0
    assert "is saved; go on with iisan-fast train --resume" in (tmp_path / "log").read_text()
    with torchrun(tmp_path, "--resume", run, "--device", "cpu") as process:
        assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert_same_run(run, undisturbed)


@pytest.mark.long
def test_a_lost_machine_leaves_the_run_to_the_ranks_of_the_others(toy_run, tmp_path):
    """Two agents of one rank stand for two machines; the second, without the store, is killed with its rank."""
    port = free_port()
    options = ("--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 3, "--rdzv-backend", "c10d")
    options = (*options, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job", "--local-addr", "127.0.0.1")
    options, conf = (*options, "--rdzv-conf"), "last_call_timeout=5"
    run = tmp_path / "runs" / "toy-1"
    with (
        torchrun(tmp_path, *settings_of(toy_run), options=(*options, f"{conf},is_host=true")) as first,
        torchrun(tmp_path, *settings_of(toy_run), options=(*options, f"{conf},is_host=false")) as second,
    ):
        wait_for(run / "metrics.jsonl", first)
        for victim in (second.pid, *ranks_of(second)):
            os.kill(victim, signal.SIGKILL)
        assert first.wait(200) == 0, (tmp_path / "log").read_text()
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert json.loads((run / "test.json").read_text())["epochs"] == 40
    assert "ranks 2 then, 1 now" in (tmp_path / "log").read_text()
