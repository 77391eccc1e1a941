"""Check where a table is placed: by free memory or as asked, and how free memory is found."""

from __future__ import annotations

import logging

import pytest
import torch

from iisan_fast.errors import InputError
from iisan_fast.states import placement
from iisan_fast.states.placement import free_memory, place, usable_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB, GIB = 1 << 20, 1 << 30


def free(monkeypatch, on_device: int | None, on_host: int | None) -> None:
    """Return a function that pretends that this many bytes are free."""
    monkeypatch.setattr(placement, "free_memory", lambda device: on_device if device.type == "cuda" else on_host)


@pytest.mark.parametrize(
    ("size", "on_device", "on_host", "expected"),
    [
        (7 * GIB, 10 * GIB, 0, "device"),
        (7 * GIB + MIB, 10 * GIB, 15 * GIB, "pinned"),
        (7 * GIB + MIB, 10 * GIB, 14 * GIB, "mapped"),
        (7 * GIB, 0, None, "mapped"),
    ],
)
def test_a_gpus_table_goes_where_there_is_room(size, on_device, on_host, expected, monkeypatch):
    free(monkeypatch, on_device, on_host)
    assert place("feature table", "auto", size, CUDA, "") == expected


@pytest.mark.parametrize(
    ("asked", "size", "device", "on_device", "line"),
    [
        ("auto", 3 * GIB, CUDA, 80 * GIB, "feature table: 3.0 GiB, on cuda (80.0 GiB free on cuda)"),
        (
            "auto",
            6 * GIB,
            CUDA,
            8 * GIB,
            "feature table: 6.0 GiB, in host memory, rows gathered ahead (8.0 GiB free on cuda)",
        ),
        ("mapped", 5 * MIB, CPU, 0, "feature table: 5 MiB, in the store's file (32.0 GiB free on cpu)"),
        ("device", 5 * MIB, CUDA, None, "feature table: 5 MiB, on cuda"),
    ],
)
def test_where_it_lies_is_said(asked, size, device, on_device, line, monkeypatch, caplog):
    free(monkeypatch, on_device, 32 * GIB)
    with caplog.at_level(logging.INFO, logger="iisan_fast"):
        place("feature table", asked, size, device, "in the store's file")
    assert caplog.messages == [line]


def test_a_home_is_measured_by_its_own_memory(monkeypatch):
    free(monkeypatch, 2 * GIB, 8 * GIB)
    assert place("a table", "pinned", 3 * GIB, CUDA, "") == "pinned"
    free(monkeypatch, 8 * GIB, 2 * GIB)
    assert place("a table", "device", 3 * GIB, CUDA, "") == "device"
    free(monkeypatch, 0, 0)
    assert place("a table", "mapped", 3 * GIB, CUDA, "") == "mapped"


@pytest.mark.parametrize("asked", ["device", "pinned"])
def test_a_home_that_is_too_small_is_refused_if_asked_for(asked, monkeypatch):
    free(monkeypatch, 2 * GIB, 2 * GIB)
    with pytest.raises(InputError) as error:
        place("a table", asked, 3 * GIB, CUDA, "")
    message = f"table: {asked} needs 3.0 GiB, found 2.0 GiB free; choose mapped, or leave it to auto"
    assert str(error.value) == message


# Free memory


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 1000 << 10),
        ({"max": "max\n", "current": "700"}, 1000 << 10),
        ({"max": "500000\n", "current": "100000\n"}, 400_000),
        ({"max": "5000000\n", "current": "100000\n"}, 1000 << 10),
        ({"max": "500000", "current": "600000"}, 0),
        ({"max": "500000", "current": "490000", "stat": "anon 1\nactive_file 30000\ninactive_file 50000\n"}, 90_000),
    ],
)
def test_free_host_memory_is_what_system_and_group_both_leave(tmp_path, group, expected, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:   100 kB\nMemAvailable:   1000 kB\nHugetlb: 0 kB\n")
    for name, content in group.items():
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(placement, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(placement, "CGROUP", tmp_path)
    assert free_memory(CPU) == expected


def test_free_memory_is_unknown_where_the_system_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(placement, "CGROUP", tmp_path)
    assert free_memory(CPU) is None
    (tmp_path / "memory.max").write_text("5000")
    (tmp_path / "memory.current").write_text("2000")
    assert free_memory(CPU) == 3000


def test_a_share_of_the_free_memory_is_usable(monkeypatch):
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    assert (usable_memory(torch.device("cuda")), usable_memory(CPU)) == (700, 500)
    monkeypatch.setattr(placement, "free_memory", lambda device: None)
    assert usable_memory(CPU) is None
