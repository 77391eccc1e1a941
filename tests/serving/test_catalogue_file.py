"""catalogue.safetensors: whole or not at all, and damage is one line."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from helpers.catalogues import some_changes
from helpers.run_folders import flip_bit
from iisan_fast import files
from iisan_fast.errors import InputError
from iisan_fast.serving.growing.catalogue_changes import CatalogueChanges, TrainedBase
from iisan_fast.serving.growing.catalogue_file import read_changes, write_changes
from iisan_fast.training.checkpoints import load_checkpoint, save_checkpoint
from iisan_fast.training.run_folder import RunFolder


def assert_same(found: CatalogueChanges, expected: CatalogueChanges) -> None:
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, (np.ndarray, torch.Tensor)):
            assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
        else:
            assert one == other


@pytest.mark.parametrize("dims", [3, None])
def test_changes_are_read_as_they_were_written(tmp_path, dims):
    folder = RunFolder(tmp_path)
    assert read_changes(folder) is None
    write_changes(folder, some_changes(dims=dims))
    assert_same(read_changes(folder), some_changes(dims=dims))
    empty = CatalogueChanges.none(TrainedBase(1, 3, "0"), 4, dims)
    write_changes(folder, empty)
    assert_same(read_changes(folder), empty)
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue.safetensors"]


def test_damage_is_one_line_with_the_remedy(tmp_path):
    folder = RunFolder(tmp_path)
    write_changes(folder, some_changes())
    content = folder.catalogue.read_bytes()
    for byte in (3, 40, len(content) // 2, len(content) - 2):
        flip_bit(folder.catalogue, byte)
        with pytest.raises(InputError, match="catalogue.safetensors: .*; restore .*, or remove it and change") as error:
            read_changes(folder)
        assert "\n" not in str(error.value)
        folder.catalogue.write_bytes(content)
    folder.catalogue.write_bytes(content[:-1])
    with pytest.raises(InputError, match="or remove it"):
        read_changes(folder)


def shortened(tensors: dict) -> None:
    tensors["vectors"] = tensors["vectors"][:2].clone()


def with_gap(tensors: dict) -> None:
    tensors["numbers"][-1] = 9


def unsorted(tensors: dict) -> None:
    tensors["numbers"] = tensors["numbers"].flip(0).contiguous()


def removed_beyond(tensors: dict) -> None:
    tensors["removed"][-1] = 6


def with_bad_ends(tensors: dict) -> None:
    tensors["title_ends"][0] = 99


def without_ids(tensors: dict) -> None:
    del tensors["item_ids"]


def doubles(tensors: dict) -> None:
    tensors["vectors"] = tensors["vectors"].double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shortened, "vectors: expected 3 items, found 2"),
        (with_gap, "without a gap"),
        (unsorted, "ascending numbers from 1"),
        (removed_beyond, "removed: expected ascending numbers from 1 to 5"),
        (with_bad_ends, "out of order"),
        (without_ids, "expected the tensors coordinates, item_id_ends"),
        (doubles, "vectors: expected torch.float32 in 2 dimensions"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, change, message):
    folder = RunFolder(tmp_path)
    write_changes(folder, some_changes())
    tensors, state = load_checkpoint(folder.catalogue)
    change(tensors)
    save_checkpoint(folder.catalogue, tensors, state)
    with pytest.raises(InputError, match=f"catalogue.safetensors: damaged: .*{message}"):
        read_changes(folder)


def test_another_format_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    write_changes(folder, some_changes())
    tensors, state = load_checkpoint(folder.catalogue)
    save_checkpoint(folder.catalogue, tensors, {**state, "format": 2})
    with pytest.raises(InputError, match="expected format 1, found 2; use the version that wrote it"):
        read_changes(folder)
    save_checkpoint(folder.catalogue, tensors, {**state, "items": 0})
    with pytest.raises(InputError, match="expected the number of trained items"):
        read_changes(folder)


class Killed(BaseException):
    """Stands for the end of the process."""


def kill(*_: object, **__: object) -> None:
    raise Killed


STEPS = {  # until which a write has come when it is killed, and whether its changes are there then
    "before the temporary file": (files.tempfile, "mkdtemp", False),
    "in the temporary file": (safetensors.torch, "save_file", False),
    "before it is on the disk": (files.os, "fsync", False),
    "before it is in place": (files.Path, "replace", False),
    "after it is in place": (files, "keep_names", True),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_write_leaves_all_or_nothing(tmp_path, monkeypatch, step):
    place, name, is_there = STEPS[step]
    folder = RunFolder(tmp_path)
    before, after = some_changes(1.0), some_changes(2.0)
    write_changes(folder, before)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, kill)
        patch.setattr(files.shutil, "rmtree", lambda path: None)  # a killed process removes nothing
        with pytest.raises(Killed):
            write_changes(folder, after)
    assert_same(read_changes(folder), after if is_there else before)
    write_changes(folder, after)
    assert_same(read_changes(folder), after)
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue.safetensors"]


def test_leftovers_of_a_killed_write_are_removed(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(safetensors.torch, "save_file", kill)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path: None)
        with pytest.raises(Killed):
            write_changes(folder, some_changes())
    assert len(list(tmp_path.iterdir())) == 1
    folder.remove_leftovers()
    assert not list(tmp_path.iterdir())


WRITES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.catalogues import some_changes
from iisan_fast.serving.growing.catalogue_file import write_changes
from iisan_fast.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[2]))
print("began", flush=True)
value = 0
while True:
    value += 1
    write_changes(folder, some_changes(float(value)))
"""


@pytest.mark.long
def test_a_process_killed_at_random_moments_leaves_whole_changes(tmp_path):
    folder = RunFolder(tmp_path)
    tests = os.path.dirname(os.path.dirname(__file__))
    generator = np.random.default_rng(0)
    values = []
    for _ in range(10):
        arguments = [sys.executable, "-c", WRITES, tests, str(tmp_path)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "began\n"
        time.sleep(float(generator.uniform(0.05, 0.4)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        changes = read_changes(folder)
        values.append(float(changes.vectors[0, 0]))
        assert_same(changes, some_changes(values[-1]))
    assert max(values) > 1
    write_changes(folder, some_changes())
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue.safetensors"]
