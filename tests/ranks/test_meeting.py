"""Ranks that do not come together: one line that says which rank, address or variable, and all are gone in seconds."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from helpers.failing_ranks import meet
from helpers.rank_programs import launcher_variables, run_programs
from iisan_fast.errors import InputError
from iisan_fast.launcher import JobPlace, job_place
from iisan_fast.ranks import meeting

VARIABLES = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
REMEDY = "start it by torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each rank"


@pytest.fixture
def launch(monkeypatch):
    """Return a function that sets the variables of a launcher, and no others."""

    def set_variables(variables: dict[str, str]) -> None:
        for name in (*VARIABLES, *SLURM):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def lines(results) -> list[str]:
    """Return the lines that all ranks have printed, and check that each ended with the code 2."""
    assert [result.returncode for result in results] == [2] * len(results)
    assert not any(result.stdout for result in results)
    return [line for result in results for line in result.stderr.splitlines()]


def test_a_rank_that_does_not_come_is_named(tmp_path):
    variables = launcher_variables(3)
    where = f"127.0.0.1:{variables[0]['MASTER_PORT']}"
    expected = f"error: rank 1 of 3 did not come to {where} within 3 seconds; start all ranks at once"
    assert lines(run_programs(tmp_path, meet, [3, 3], [variables[0], variables[2]])) == [expected]


@pytest.mark.long
def test_the_first_of_the_others_says_that_rank_0_does_not_come(tmp_path):
    variables = launcher_variables(3)
    where = f"127.0.0.1:{variables[0]['MASTER_PORT']}"
    (line,) = lines(run_programs(tmp_path, meet, [1, 1], variables[1:]))
    assert line.startswith(
        f"error: MASTER_ADDR, MASTER_PORT: nothing answers at {where} within 1 seconds; start rank 0"
    )


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        results = run_programs(tmp_path, meet, [1, 1], launcher_variables(2, MASTER_PORT=str(port)))
    assert lines(results) == [f"error: MASTER_PORT: port {port} is in use on this machine; choose another"]


def test_an_unknown_machine_is_one_line(tmp_path):
    results = run_programs(tmp_path, meet, [1, 1], launcher_variables(2, MASTER_ADDR="no-such-host.invalid"))
    (line,) = lines(results)
    assert line.startswith("error: MASTER_ADDR: 'no-such-host.invalid' cannot be resolved (")
    assert line.endswith("); give the name or IP address of rank 0's machine")


@pytest.fixture
def places(monkeypatch) -> list[JobPlace]:
    """Return the places of two ranks, which look often for each other."""
    monkeypatch.setattr(meeting, "RETRY_SECONDS", 0.01)
    return [JobPlace(rank, 2, rank, "here", 1, True, True, True) for rank in range(2)]


def test_two_processes_of_one_rank_are_refused(places):
    store = HashStore()
    first, twice, last = [JobPlace(rank, 3, rank, "here", 1, True, True, True) for rank in range(3)]
    deadline = time.monotonic() + 30
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(meeting._meet, store, place, deadline) for place in (first, twice, twice)]
        time.sleep(0.3)  # all of them have come
        name = meeting._meet(store, last, deadline)
        outcomes = [rank.exception() or rank.result() for rank in early]
    line = "rank 1 came twice to here:1; another job uses the port: choose another"
    assert sorted(map(str, outcomes)) == [name, name, line]


def test_a_store_that_outlives_a_job_serves_the_next_one(places):
    store = HashStore()
    names = []
    for _ in range(2):
        deadline = time.monotonic() + 30
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(meeting._meet, store, places[1], deadline)
            time.sleep(0.1)  # the other rank finds the meeting of the job before
            names.append(meeting._meet(store, places[0], deadline))
            assert other.result() == names[-1]
    assert len(set(names)) == 2


@pytest.mark.parametrize("missing", ["is_available", "is_gloo_available"])
def test_a_torch_without_its_parts_is_one_line(monkeypatch, launch, missing):
    from torch import distributed

    from iisan_fast.ranks.meeting import job_store

    launch(VARIABLES)
    monkeypatch.setattr(distributed, missing, lambda: False)
    with pytest.raises(InputError, match="^torch: was built without .*, which several ranks need; install another"):
        job_store(job_place())


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({**VARIABLES, "WORLD_SIZE": "1"}, None),
        (VARIABLES, (1, 4, 0, "node-1", 29500)),
        ({**SLURM, **VARIABLES}, (1, 4, 0, "node-1", 29500)),
        ({**SLURM, "MASTER_ADDR": "node-2", "MASTER_PORT": "1"}, (3, 4, 1, "node-2", 1)),
        (SLURM, None),
    ],
)
def test_the_place_is_that_of_the_launcher(launch, variables, place):
    launch(variables)
    actual = job_place()
    if place is None:
        assert actual is None
    else:
        assert isinstance(actual, JobPlace)
        assert (actual.rank, actual.count, actual.local_rank, actual.address, actual.port) == place


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", None, "RANK: expected a whole number from 0 to 3, found none"),
        ("RANK", "4", "RANK: expected a whole number from 0 to 3, found '4'"),
        ("WORLD_SIZE", "two", "WORLD_SIZE: expected a whole number from 0 to 1048576, found 'two'"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK: expected a whole number from 0 to 3, found '-1'"),
        ("MASTER_PORT", "70000", "MASTER_PORT: expected a whole number from 0 to 65535, found '70000'"),
        ("MASTER_ADDR", None, "MASTER_ADDR: expected the name of the machine of rank 0, found none"),
    ],
)
def test_a_wrong_variable_is_named(launch, name, value, message):
    changed = {**VARIABLES, name: value}
    launch({other: text for other, text in changed.items() if text is not None})
    with pytest.raises(InputError) as error:
        job_place()
    assert str(error.value) == f"{message}; {REMEDY}"


def test_torchrun_and_the_program_print_one_line_for_bad_input_on_one_rank(toy_run, tmp_path):
    dataset, cache = toy_run
    (tmp_path / "dataset-0").symlink_to(dataset)
    command = f'exec "$0" -m iisan_fast train dataset-$RANK --cache {cache} --epochs 1 --json'
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    result = subprocess.run(
        [*launcher, "bash", "-c", command, sys.executable], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("error", "stopped", "internal"))]
    problem = f"{tmp_path / 'dataset-1'}: no such folder; expected a dataset with items.tsv and users.tsv"
    assert line == f"error: rank 1 on {socket.gethostname()}: {problem}"
    assert result.stderr.count("exitcode  : 2 ") == 2
