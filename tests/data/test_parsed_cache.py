"""A dataset that is read from its parsed arrays is the one that was parsed, or the arrays are made again."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iisan_fast.config import ProtocolConfig
from iisan_fast.data import fast_tables, growing_arrays, histories, jagged_arrays, parsed_cache, text_array
from iisan_fast.data.parsed_dataset import parse_dataset
from iisan_fast.data.saved_sequences import load_sequences
from iisan_fast.data.sequences import Dataset, load_dataset, statistics
from iisan_fast.errors import InputError

PROTOCOLS = {
    "leave-one-out": ProtocolConfig(missing_captions="title"),
    "temporal": ProtocolConfig(split="temporal", validation_from=0.6, test_from=0.8),
    "given": ProtocolConfig(split="given"),
}
ITEMS = ["a", "b", "c", "dé", "e-5", "6", "é"]


def write_dataset(root: Path, users: int = 40) -> Path:
    """Write a dataset with times, a given split, some captions, and users that the protocol drops."""
    generator = np.random.default_rng(3)
    root.mkdir()
    lines: dict[str, list[str]] = {"users.tsv": [], "times.tsv": [], "splits.tsv": []}
    for user in range(users):
        length = int(generator.integers(3, 18))
        cuts = np.sort(generator.integers(0, length + 1, 2))
        rows = {
            "users.tsv": [ITEMS[item] for item in generator.integers(0, len(ITEMS) - 1, length)],
            "times.tsv": np.sort(generator.integers(0, 1000, length)).tolist(),
            "splits.tsv": np.diff(cuts, prepend=0, append=length).tolist(),
        }
        for name, words in rows.items():
            lines[name].append(f"Ü{user}\t{' '.join(map(str, words))}\n")
    for name, rows_of_file in lines.items():
        (root / name).write_text("".join(rows_of_file))
    (root / "items.tsv").write_text("".join(f"{item}\tTitle &amp; {item}\n" for item in ITEMS))
    (root / "captions.tsv").write_text("b\tsomething red\né\tnothing\n")
    return root


def plain(dataset: Dataset) -> dict[str, Any]:
    """Return all that a dataset holds, as values that == compares."""
    sequences = dataset.sequences
    return {
        "titles": dataset.titles,
        "captions": dataset.captions,
        "protocol": dataset.protocol,
        "user_ids": list(sequences.user_ids),
        "item_ids": sequences.item_ids,
        "max_inputs": sequences.max_inputs,
        "without_history": sequences.without_history,
        "offsets": sequences.offsets.tolist(),
        "items": sequences.items.tolist(),
        "training_ends": sequences.training_ends.tolist(),
        "targets": {name: targets.tolist() for name, targets in sequences.targets.items()},
        "target_counts": {name: counts.tolist() for name, counts in sequences.target_counts.items()},
    }


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Cache every dataset, however small, and read and write it a few users at a time."""
    monkeypatch.setenv(parsed_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(parsed_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(jagged_arrays.row_blocks, "__defaults__", (30,))
    for module in (text_array, growing_arrays):
        monkeypatch.setattr(module, "TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(histories, "USERS_AT_ONCE", 7)
    return tmp_path / "cache"


def in_memory(root: Path, protocol: ProtocolConfig = ProtocolConfig()) -> Dataset:
    """Return a dataset that is parsed without the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsed_cache, "LEAST_BYTES", sys.maxsize)
        return load_dataset(root, protocol)


def entries(cache: Path) -> list[Path]:
    """Return the datasets in the cache. Nothing else may lie there."""
    paths = sorted(cache.iterdir())
    assert all(parsed_cache.ENTRY.fullmatch(path.name) for path in paths), paths
    return paths


@pytest.mark.parametrize("by_polars", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_cached_dataset_is_the_parsed_one(tmp_path, cache, monkeypatch, caplog, protocol, by_polars):
    root = write_dataset(tmp_path / "d")
    expected = in_memory(root, protocol)
    if by_polars:
        monkeypatch.setattr(fast_tables, "LEAST_BYTES", 0)
        monkeypatch.setattr(fast_tables, "BLOCK_BYTES", 64)
    else:
        monkeypatch.setitem(sys.modules, "polars", None)
    caplog.set_level(logging.INFO, "iisan_fast")
    written = load_dataset(root, protocol)
    assert "its arrays are written into" in caplog.text and len(entries(cache)) == 1
    monkeypatch.setattr(parsed_cache, "parse_dataset", lambda *_: pytest.fail("parsed again"))
    caplog.clear()
    mapped = load_dataset(root, protocol)
    assert f"read from its parsed arrays in {entries(cache)[0]}" in caplog.text
    assert ("targets have no interaction before them" in caplog.text) == (protocol.split == "given")
    assert plain(written) == plain(mapped) == plain(expected)
    assert statistics(mapped.sequences) == statistics(expected.sequences)
    sequences = mapped.sequences
    assert not sequences.items.flags.writeable and sequences.items.dtype == np.int32
    assert isinstance(sequences.user_ids, text_array.TextArray) and sequences.user_ids == expected.sequences.user_ids
    for name in ("validation", "test"):
        ours, theirs = sequences.split(name), expected.sequences.split(name)
        rows = np.arange(len(theirs.targets))[::-2]
        for before, now in (
            (theirs.inputs[rows], ours.inputs_of(rows)),
            (theirs.padded(rows), ours.padded(rows)),
            (theirs.latest(4)[rows], ours.latest(4, rows)),
            (theirs.targets, ours.targets),
            (theirs.reachable, ours.reachable),
        ):
            assert before.dtype == now.dtype and np.array_equal(before, now)
    for saved, data in (("before.npz", expected), ("now.npz", mapped)):
        data.sequences.save(tmp_path / saved)
    before, now = (load_sequences(tmp_path / name) for name in ("before.npz", "now.npz"))
    assert plain(replace(expected, sequences=before)) == plain(replace(expected, sequences=now)) == plain(expected)


def other_text(line: str) -> str:
    return line[:-1] + "X"


def other_items(line: str) -> str:
    return line.replace("a", "b").replace("c", "b")


def other_time(line: str) -> str:
    return line[:-1] + str((int(line[-1]) + 1) % 10 or 9)


def other_parts(line: str) -> str:
    user, counts = line.split("\t")
    return f"{user}\t{' '.join(reversed(counts.split()))}"


@pytest.mark.parametrize(
    ("file", "split", "edit"),
    [
        ("users.tsv", "leave-one-out", other_items),
        ("items.tsv", "leave-one-out", other_text),
        ("captions.tsv", "leave-one-out", other_text),
        ("times.tsv", "temporal", other_time),
        ("splits.tsv", "given", other_parts),
    ],
)
def test_an_edited_file_is_another_dataset(tmp_path, cache, file, split, edit):
    root = write_dataset(tmp_path / "d")
    protocol = PROTOCOLS[split]
    load_dataset(root, protocol)
    times = os.stat(root / file)
    first, rest = (root / file).read_text().split("\n", 1)
    changed = edit(first)
    assert changed != first
    (root / file).write_text(changed + "\n" + rest)
    os.utime(root / file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the content decides
    assert plain(load_dataset(root, protocol)) == plain(in_memory(root, protocol))
    assert len(entries(cache)) == 2


def test_a_protocol_and_a_missing_file_are_other_datasets_too(tmp_path, cache):
    root = write_dataset(tmp_path / "d")
    protocols = [ProtocolConfig(), ProtocolConfig(min_interactions=6), ProtocolConfig(unescape_titles=False)]
    for protocol in protocols:
        assert plain(load_dataset(root, protocol)) == plain(in_memory(root, protocol))
    (root / "captions.tsv").unlink()
    assert load_dataset(root).captions == [None] * len(ITEMS[:-1])
    assert len(entries(cache)) == 4


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_made_again(tmp_path, cache, caplog, damage):
    root = write_dataset(tmp_path / "d")
    expected = plain(load_dataset(root))
    (entry,) = entries(cache)
    files = sorted(entry.iterdir())
    assert {"index.json", "items.bin", "user_ids.bin"} < {path.name for path in files}
    for path in files:
        caplog.clear()
        DAMAGE[damage](path)
        assert plain(load_dataset(root)) == expected
        missing_index = path.name == "index.json" and damage == "missing"
        assert missing_index or f"{entry}: the parsed dataset is damaged ({path.name}" in caplog.text
        assert sorted(entry.iterdir()) == files and len(entries(cache)) == 1


def test_another_entry_under_this_name_is_not_taken(tmp_path, cache, caplog):
    root = write_dataset(tmp_path / "d")
    load_dataset(root, ProtocolConfig(max_inputs=7))
    (other,) = entries(cache)
    expected = plain(load_dataset(root))
    (entry,) = {*entries(cache)} - {other}
    shutil.rmtree(entry)
    shutil.copytree(other, entry)
    assert plain(load_dataset(root)) == expected
    assert "is damaged (index.json is of another dataset)" in caplog.text


def test_the_datasets_used_last_are_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(parsed_cache, "MOST_DATASETS", 2)
    parsed = []
    monkeypatch.setattr(parsed_cache, "parse_dataset", lambda *words: parsed.append(words) or parse_dataset(*words))
    root = write_dataset(tmp_path / "d")
    written = []
    for number, least in enumerate((4, 5, 6)):
        load_dataset(root, ProtocolConfig(min_interactions=least))
        (new,) = {*entries(cache)} - {*written}
        os.utime(new / "index.json", (number, number))
        written.append(new)
        load_dataset(root, ProtocolConfig(min_interactions=4))  # used again
    assert entries(cache) == sorted([written[0], written[2]]) and len(parsed) == 3


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_stands_in_the_place_of_a_dataset_stays_and_is_no_error(tmp_path, cache, monkeypatch, caplog, is_folder):
    root = write_dataset(tmp_path / "d")
    expected = plain(load_dataset(root))
    (entry,) = entries(cache)
    shutil.rmtree(entry)
    entry.mkdir() if is_folder else entry.write_text("")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as of another user's folder
    caplog.set_level(logging.INFO, "iisan_fast")
    assert plain(load_dataset(root)) == expected
    assert f"{root}: parsed in memory; its arrays cannot be cached ([Errno 17] File exists" in caplog.text
    assert entries(cache) == [entry]


class Full(growing_arrays.GrowingArrays):
    """Arrays in a folder without room for the items."""

    def array(self, name: str, dtype: type[np.generic]) -> growing_arrays.GrowingArray:
        if name == "items" and self.folder is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        return super().array(name, dtype)


@pytest.mark.parametrize("trouble", ["a file in its place", "read-only", "no room", "changed meanwhile"])
def test_without_a_cache_a_dataset_is_parsed_in_memory(tmp_path, cache, monkeypatch, caplog, trouble):
    root = write_dataset(tmp_path / "d")
    expected = plain(in_memory(root))
    caplog.set_level(logging.INFO, "iisan_fast")
    if trouble == "a file in its place":
        cache.write_text("")
    elif trouble == "no room":
        monkeypatch.setattr(parsed_cache, "GrowingArrays", Full)
    elif trouble == "read-only":
        monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: os.mkdir("/proc/new"))
    else:
        monkeypatch.setattr(parsed_cache, "_states_of_files", lambda *_: object())
    dataset = load_dataset(root)
    assert plain(dataset) == expected and dataset.sequences.items.dtype == np.int32  # as on other ranks, with a cache
    assert f"{root}: parsed in memory; its arrays cannot be cached" in caplog.text
    assert not cache.is_dir() or not entries(cache)


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_begin_together_parse_once_or_keep_the_first_result(tmp_path, cache, monkeypatch, locks):
    root = write_dataset(tmp_path / "d")
    expected = plain(in_memory(root))
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    parsed, results = fork.SimpleQueue(), fork.SimpleQueue()

    def parse(*arguments: Any) -> Any:
        parsed.put(os.getpid())
        if not locks:
            barrier.wait(60)  # all are under way
        return parse_dataset(*arguments)

    def acquire(lock: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def load() -> None:
        if locks:
            barrier.wait(60)
        results.put(plain(load_dataset(root)))

    monkeypatch.setattr(parsed_cache, "parse_dataset", parse)
    if not locks:
        monkeypatch.setattr(parsed_cache.FileLock, "acquire", acquire)
    processes = [fork.Process(target=load) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(results.get() == expected for _ in processes)
    times = 0
    while not parsed.empty():
        parsed.get()
        times += 1
    assert times == (1 if locks else 3) and len(entries(cache)) == 1


def test_what_a_killed_process_left_is_removed(tmp_path, cache):
    root = write_dataset(tmp_path / "d")
    left = cache / f".{'0' * 64}.iisan-fast-abcdefgh"
    left.mkdir(parents=True)
    (left / "items.bin").write_bytes(b"some")
    load_dataset(root)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("by_polars", [True, False])
def test_errors_of_a_cached_dataset_are_those_of_a_parsed_one(tmp_path, cache, monkeypatch, by_polars):
    root = write_dataset(tmp_path / "d")
    users = (root / "users.tsv").read_text()
    edits = [
        users + users.splitlines()[4] + "\n" + users.splitlines()[2] + "\n",
        users + users.splitlines()[4] + "\nlast\tmissing\n",
        users + "last\tmissing\n" + users.splitlines()[4] + "\n",
        users + "last\ta\tb\n",
    ]
    if by_polars:
        monkeypatch.setattr(fast_tables, "LEAST_BYTES", 0)
    for edit in edits:
        (root / "users.tsv").write_text(edit)
        with pytest.raises(InputError) as expected:
            in_memory(root)
        with pytest.raises(InputError, match="line 4[12]") as refused:
            load_dataset(root)
        assert str(refused.value) == str(expected.value) and not entries(cache)
    (root / "items.tsv").unlink()
    with pytest.raises(InputError, match="items.tsv: no such file"):
        load_dataset(root)
    os.mkfifo(root / "items.tsv")
    with pytest.raises(InputError, match="expected a regular file, found a FIFO"):
        load_dataset(root)
