"""Digests of weights depend on the content, not on the folder, and are remembered until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from iisan_fast import fingerprints as digests
from iisan_fast.fingerprints import file_digest, value_digest, weights_digest


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Path:
    """Return the file in which digests are remembered during the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "iisan-fast" / "digests.json"


@pytest.fixture
def hashed(memory, monkeypatch) -> list[str]:
    """Return the names of the files hashed, one entry each time."""
    names = []
    hash_file = digests._hash

    def note(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(digests, "_hash", note)
    return names


def encoder(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in {"config.json": b"{}", "model.safetensors": b"weights", **files}.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_file_digest_is_its_sha256(tmp_path, memory):
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_again_only_when_size_or_time_change(tmp_path, hashed):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    first = file_digest(file)
    assert file_digest(file) == first and hashed == ["file"]
    file.write_bytes(b"two")
    os.utime(file, ns=(2, 2))
    second = file_digest(file)
    assert second != first and hashed == ["file"] * 2
    file.write_bytes(b"four")
    os.utime(file, ns=(2, 2))
    assert file_digest(file) not in (first, second) and hashed == ["file"] * 3


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b"entries"])
def test_a_damaged_memory_is_ignored_and_rewritten(tmp_path, memory, hashed, damage):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    memory.parent.mkdir(parents=True)
    memory.write_bytes(json.dumps({str(file): 7}).encode() if damage == b"entries" else damage)
    assert file_digest(file) == file_digest(file) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["file"] and list(json.loads(memory.read_text())) == [str(file)]


def test_a_memory_that_cannot_be_written_only_costs_hashing(tmp_path, monkeypatch, hashed):
    (tmp_path / "in the way").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in the way"))
    (tmp_path / "file").write_bytes(b"one")
    assert file_digest(tmp_path / "file") == file_digest(tmp_path / "file") == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["file"] * 2


def test_without_xdg_the_memory_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_bytes(b"one")
    file_digest(tmp_path / "file")
    assert (tmp_path / ".cache" / "iisan-fast" / "digests.json").is_file()


def test_a_digest_depends_on_content_not_on_the_folder(tmp_path, memory):
    digest = weights_digest(encoder(tmp_path / "one"))
    assert weights_digest(encoder(tmp_path / "two")) == digest
    assert weights_digest(encoder(tmp_path / "readme", **{"README.md": b"words"})) == digest
    assert weights_digest(encoder(tmp_path / "weights", **{"model.safetensors": b"others"})) != digest
    assert weights_digest(encoder(tmp_path / "config", **{"config.json": b'{"layers": 1}'})) != digest
    assert weights_digest(encoder(tmp_path / "shard", **{"model-2.safetensors": b"more"})) != digest


def test_only_the_weights_that_are_loaded_count(tmp_path, memory):
    """Ignore .bin files beside safetensors, as transformers does."""
    both = {"pytorch_model.bin": b"old weights"}
    assert weights_digest(encoder(tmp_path / "one")) == weights_digest(encoder(tmp_path / "two", **both))
    for name, content in (("three", b"a"), ("four", b"b")):
        (encoder(tmp_path / name, **{"pytorch_model.bin": content}) / "model.safetensors").unlink()
    assert weights_digest(tmp_path / "three") != weights_digest(tmp_path / "four")


def test_a_value_digest_does_not_depend_on_the_order_of_keys():
    assert value_digest({"a": 1, "b": [2, 3]}) == value_digest({"b": [2, 3], "a": 1})
    assert value_digest({"a": 1, "b": [2, 3]}) != value_digest({"a": 1, "b": [3, 2]})
