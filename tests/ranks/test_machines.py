"""A rank's share of its machine: cores, and a GPU."""

from __future__ import annotations

import pytest
import torch

from iisan_fast import devices
from iisan_fast.devices import torch_device
from iisan_fast.errors import InputError
from iisan_fast.launcher import job_place
from iisan_fast.ranks.machines import Machine, share_of_cores, take_share_of_cores

EIGHT = frozenset(range(8))


@pytest.fixture
def launch(monkeypatch):
    """Return a function that sets the variables of a launcher for a rank of four, with some changes."""

    def set_variables(rank: int, **changes: str) -> None:
        for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4"}
        for name, value in {**place, "MASTER_ADDR": "a", "MASTER_PORT": "29500", **changes}.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that lets torch see some GPUs."""

    def show(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr("iisan_fast.kernels.check_form", lambda device: None)

    return show


@pytest.mark.parametrize(
    ("machines", "shares"),
    [
        ([Machine("a", EIGHT)] * 2, [4, 4]),
        ([Machine("a", EIGHT)] * 3, [2, 2, 2]),
        ([Machine("a", EIGHT), Machine("b", EIGHT)], [8, 8]),
        ([Machine("a", frozenset((0, 1, 2))), Machine("a", frozenset((3,)))], [3, 1]),
        ([Machine("a", EIGHT), Machine("a", frozenset((0, 1)))], [7, 1]),
        ([Machine("a", frozenset((0,)))] * 4, [1, 1, 1, 1]),
    ],
    ids=["one machine", "not divisible", "two machines", "bound", "overlapping", "fewer cores than ranks"],
)
def test_cores_are_shared_out_by_machine(machines, shares):
    assert [share_of_cores(machines, rank) for rank in range(len(machines))] == shares


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"OMP_NUM_THREADS": "1"}, 2),
    ],
    ids=["unset", "torchrun's", "the user's", "the user's without torchrun"],
)
def test_threads_are_the_share_unless_the_user_chose(launch, threads_given_back, variables, threads):
    launch(0, **variables)
    torch.set_num_threads(2)
    take_share_of_cores(job_place(), [Machine("a", EIGHT)] * 2)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_rank_takes_the_gpu_of_its_place(launch, gpus, name):
    gpus(2)
    for rank in range(4):
        launch(rank)
        assert torch_device(name) == torch.device("cuda", rank % 2)


def test_a_rank_that_sees_one_gpu_by_its_launcher_takes_it(launch, gpus):
    gpus(1)
    launch(3, CUDA_VISIBLE_DEVICES="7")
    assert torch_device("auto") == torch.device("cuda", 0)
    launch(3, CUDA_VISIBLE_DEVICES="7", TORCHELASTIC_RUN_ID="x")
    with pytest.raises(InputError, match="^device: LOCAL_RANK is 1, and this machine has 1 CUDA devices; start at"):
        torch_device("auto")


def test_one_gpu_for_all_ranks_is_refused(launch, gpus):
    gpus(2)
    launch(1)
    with pytest.raises(InputError, match="^device: expected auto, cpu or cuda on 4 ranks, found 'cuda:1'$"):
        torch_device("cuda:1")
    assert torch_device("cpu") == torch.device("cpu")
    assert devices.local_gpu(job_place()) == 1


def test_without_a_launcher_nothing_changes(gpus):
    gpus(2)
    assert torch_device("auto") == torch.device("cuda")
    assert torch_device("cuda:1") == torch.device("cuda", 1)
