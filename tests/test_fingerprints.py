"""Digests of weights depend on the content, not on the folder, and are remembered until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from iisan_fast import fingerprints as digests
from iisan_fast.errors import InputError
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


@pytest.fixture
def settled(monkeypatch) -> None:
    """Let files that were just written count as written long ago."""
    monkeypatch.setattr(digests, "SETTLED", -(10**9))


def encoder(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in {"config.json": b"{}", "model.safetensors": b"weights", **files}.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_file_digest_is_its_sha256(tmp_path, memory):
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_again_only_when_it_changes(tmp_path, hashed, settled):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = file_digest(file)
    assert file_digest(file) == first and hashed == ["file"]
    file.write_bytes(b"four")
    assert file_digest(file) == hashlib.sha256(b"four").hexdigest() and hashed == ["file"] * 2


@pytest.mark.parametrize("way", ["in place", "renamed", "copied"])
def test_another_content_of_the_same_size_and_time_is_hashed(tmp_path, hashed, settled, way):
    """rsync -t, cp -p, tar and a restored backup set the time of modification."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    assert file_digest(file) == hashlib.sha256(b"one").hexdigest()
    other = file if way == "in place" else tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(1, 1))
    if way == "renamed":
        other.rename(file)
    elif way == "copied":
        shutil.copy2(other, file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (3, 1)
    assert file_digest(file) == hashlib.sha256(b"two").hexdigest() and hashed == ["file"] * 2


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, hashed, memory):
    """A further change may get the same time, as clocks of file systems are coarse."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    assert file_digest(file) == file_digest(file)
    assert hashed == ["file"] * 2 and not memory.exists()


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(tmp_path, memory, monkeypatch, settled):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    hash_file = digests._hash
    contents = [b"three", b"two"]

    def change(path: Path) -> str:
        digest = hash_file(path)
        if contents:
            path.write_bytes(contents.pop())
        return digest

    monkeypatch.setattr(digests, "_hash", change)
    assert file_digest(file) == hashlib.sha256(b"three").hexdigest()
    contents += [b"x" * length for length in range(20)]
    file.write_bytes(b"one more time")
    with pytest.raises(InputError, match="file: is being written all the time; wait for that to end"):
        file_digest(file)


@pytest.mark.parametrize("change", ["digest", "stamp", "short form", "path"])
def test_a_saved_entry_that_is_damaged_or_of_an_older_version_is_not_believed(
    tmp_path, memory, hashed, settled, change
):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    file_digest(file)
    entries = json.loads(memory.read_text())
    entry = entries[str(file)]
    match change:
        case "digest":
            entry["digest"] = "0" + entry["digest"][1:]
        case "stamp":
            file.write_bytes(b"two")
            status = file.stat()
            entry["stamp"][-2:] = [status.st_mtime_ns, status.st_ctime_ns]
        case "short form":
            status = file.stat()
            entries[str(file)] = [status.st_size, status.st_mtime_ns, "0" * 64]
        case "path":
            file = file.rename(tmp_path / "moved")
            entries = {str(file): entry}
    memory.write_text(json.dumps(entries))
    assert file_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest() and len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b"[" * 99_999, b"entries"])
def test_a_damaged_memory_is_ignored_and_rewritten(tmp_path, memory, hashed, settled, damage):
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


def test_without_xdg_the_memory_lies_in_the_users_cache(tmp_path, monkeypatch, settled):
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


@pytest.mark.parametrize(
    ("names", "changed", "counts"),
    [
        ({"adapter_model.safetensors", "pytorch_model.bin"}, "pytorch_model.bin", True),
        ({"extra.safetensors", "pytorch_model-1.bin", "pytorch_model.bin.index.json"}, "pytorch_model-1.bin", True),
        ({"model-1.safetensors", "model.safetensors.index.json"}, "model-1.safetensors", True),
        ({"model.safetensors.index.json", "shards/one.safetensors"}, "shards/one.safetensors", True),
        ({"pytorch_model.bin.index.json", "shards/one.safetensors"}, "shards/one.safetensors", True),
        ({"model.fp16.safetensors"}, "model.fp16.safetensors", True),
        ({"model.safetensors", "pytorch_model.fp16.bin"}, "pytorch_model.fp16.bin", True),
        ({"model.safetensors", "adapter_model.safetensors"}, "adapter_model.safetensors", True),
        ({"model-1.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}, "pytorch_model.bin", False),
        ({"model.safetensors", "training_args.bin"}, "training_args.bin", False),
    ],
)
def test_each_file_that_may_be_loaded_counts(tmp_path, memory, names, changed, counts):
    index = json.dumps({"weight_map": {"a": "shards/one.safetensors", "b": "shards/missing.safetensors"}})
    files = {"config.json": "{}", **{name: index if name.endswith(".json") else "weights" for name in names}}
    for name, content in files.items():
        (tmp_path / "encoder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "encoder" / name).write_text(content)
    digest = weights_digest(tmp_path / "encoder")
    (tmp_path / "encoder" / changed).write_text("others!")
    assert (weights_digest(tmp_path / "encoder") != digest) == counts


def test_the_digest_of_an_ordinary_encoder_is_that_of_all_versions(tmp_path, memory):
    """Caches record it, and would be out of date with another one."""
    content = {
        name: hashlib.sha256(text).hexdigest()
        for name, text in (("config.json", b"{}"), ("model.safetensors", b"weights"))
    }
    expected = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert weights_digest(encoder(tmp_path / "encoder")) == expected


def test_a_fifo_among_the_weights_is_refused(tmp_path, memory):
    os.mkfifo(encoder(tmp_path / "encoder") / "more.safetensors")
    with pytest.raises(InputError, match="expected a regular file, found a FIFO"):
        weights_digest(tmp_path / "encoder")


def test_a_value_digest_does_not_depend_on_the_order_of_keys():
    assert value_digest({"a": 1, "b": [2, 3]}) == value_digest({"b": [2, 3], "a": 1})
    assert value_digest({"a": 1, "b": [2, 3]}) != value_digest({"a": 1, "b": [3, 2]})
