"""Saved histories: what is written is read, files of older versions are too, and damage is one line."""

from __future__ import annotations

import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from iisan_fast.data import array_files, saved_sequences
from iisan_fast.data.array_files import CHECKSUMS
from iisan_fast.data.saved_sequences import load_sequences
from iisan_fast.data.sequences import Sequences
from iisan_fast.data.text_array import TextArray
from iisan_fast.errors import InputError

HISTORIES = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 1]]


def same(loaded, sequences) -> bool:
    arrays = [
        (
            histories.offsets,
            histories.items,
            histories.training_ends,
            histories.targets["validation"],
            histories.targets["test"],
        )
        for histories in (loaded, sequences)
    ]
    ids = [(histories.user_ids, histories.item_ids, histories.max_inputs) for histories in (loaded, sequences)]
    return ids[0] == ids[1] and all(np.array_equal(*pair) and pair[0].dtype == np.int64 for pair in zip(*arrays))


def saved(folder: Path, histories: list[list[int]] = HISTORIES) -> Path:
    make_sequences(histories).save(folder / "s.npz")
    return folder / "s.npz"


def changed(path: Path, checksums: bool = False, **changes: object) -> Path:
    """Replace arrays of a file; those that are None are left out. Without `checksums` it is like an older file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if checksums or name != CHECKSUMS}
    arrays |= changes
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def older(path: Path, **changes: object) -> Path:
    """Make a file as the first versions wrote it."""
    sequences = load_sequences(path)
    ids = {"user_ids": np.array(sequences.user_ids), "item_ids": np.array(sequences.item_ids)}
    return changed(path, **{"user_id_ends": None, "item_id_ends": None, **ids, **changes})


def load_sequences_wide(path: Path) -> Sequences:
    """Return the sequences of a file with all its limits, as a small file is read."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MOST_LISTED_IDS", "MOST_WIDE_ITEMS"):
            patch.setattr(saved_sequences, name, 1 << 20)
        return load_sequences(path)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_sequences(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1 and len(message) < 400
    return message


def test_what_is_written_is_read(tmp_path):
    sequences = make_sequences(HISTORIES)
    loaded = load_sequences(saved(tmp_path))
    assert same(loaded, sequences)
    assert loaded.training_ends.tolist() == [3, 9]
    assert loaded.targets["validation"].tolist() == [3, 9] and loaded.targets["test"].tolist() == [4, 10]
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert f"{CHECKSUMS}.npy" in archive.namelist()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=5, max_size=5, unique=True))
def test_ids_of_any_text_and_length(tmp_path_factory, texts):
    sequences = make_sequences(HISTORIES)
    sequences.item_ids[:] = texts
    path = tmp_path_factory.mktemp("ids") / "s.npz"
    sequences.save(path)
    assert load_sequences(path).item_ids == texts


def test_a_long_id_does_not_make_all_ids_wide(tmp_path):
    sequences = make_sequences([[1, 2, 3, 4, 5]] * 2000)
    sequences.user_ids[7] = "x" * 2_000_000
    tracemalloc.start()
    sequences.save(tmp_path / "s.npz")
    assert load_sequences(tmp_path / "s.npz").user_ids == sequences.user_ids
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000 and (tmp_path / "s.npz").stat().st_size < 50_000


def test_many_users_stay_packed_and_their_items_narrow(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_sequences, "MOST_LISTED_IDS", 1)
    monkeypatch.setattr(saved_sequences, "MOST_WIDE_ITEMS", 10)
    monkeypatch.setattr(array_files, "FREE_BYTES", 100)  # the file is packed less
    sequences = make_sequences(HISTORIES)
    path = saved(tmp_path)
    loaded = load_sequences(path)
    assert isinstance(loaded.user_ids, TextArray) and isinstance(loaded.item_ids, list)
    assert loaded.user_ids == sequences.user_ids and loaded.items.dtype == np.int32
    assert np.array_equal(loaded.items, sequences.items)
    again = tmp_path / "again.npz"
    loaded.save(again)
    assert again.read_bytes()[:64] == path.read_bytes()[:64] and same(load_sequences_wide(again), sequences)
    for ids, reason in ((["u", "u"], "has an id twice"), (["u", "\udcff"], "is damaged")):
        content = [text.encode(errors="surrogateescape") for text in ids]
        arrays = {"user_ids": np.frombuffer(b"".join(content), np.uint8), "user_id_ends": np.array([1, 2])}
        assert f"array user_ids {reason}" in refusal(changed(path, **arrays))


@pytest.mark.parametrize("with_split", [False, True])
def test_files_of_older_versions_are_read(tmp_path, with_split):
    without = {} if with_split else {"training_ends": None, "validation_targets": None, "test_targets": None}
    path = older(saved(tmp_path), **without)
    assert same(load_sequences(path), make_sequences(HISTORIES))


def offsets(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("changes", "array"),
    [
        ({"offsets": offsets(0, 5)}, "user_ids"),
        ({"offsets": offsets(1, 5, 11)}, "offsets"),
        ({"offsets": offsets(0, 5, 12)}, "offsets"),
        ({"offsets": offsets(0, 12, 11)}, "offsets"),
        ({"offsets": offsets(0, -5, 11)}, "offsets"),
        ({"offsets": offsets(0, 0, 11)}, "offsets"),
        ({"offsets": offsets(0, 2**62, 11)}, "offsets"),
        ({"offsets": offsets()}, "user_ids"),
        ({"offsets": np.zeros((2, 2), np.int64)}, "offsets"),
        ({"offsets": np.array([0.0, 5.0, 11.0])}, "offsets"),
        ({"offsets": np.array([None, 5, 11], dtype=object)}, "offsets"),
        ({"offsets": None}, "offsets"),
        ({"items": np.full(11, 6, np.int32)}, "items"),
        ({"items": np.full(11, 0, np.int32)}, "items"),
        ({"items": np.full(11, -1, np.int64)}, "items"),
        ({"items": np.full(11, 2**62, np.int64)}, "items"),
        ({"items": np.full(11, 1, ">i4")}, "items"),
        ({"max_inputs": np.int64(0)}, "max_inputs"),
        ({"max_inputs": np.int64(2**40)}, "max_inputs"),
        ({"max_inputs": offsets(10)}, "max_inputs"),
        ({"training_ends": offsets(3, 12)}, "training_ends"),
        ({"training_ends": offsets(3)}, "training_ends"),
        ({"training_ends": None}, "training_ends"),
        ({"training_ends": offsets(3, 10)}, "validation_targets"),
        ({"validation_targets": offsets(3, 11)}, "validation_targets"),
        ({"validation_targets": offsets(0, 9)}, "validation_targets"),
        ({"test_targets": offsets(-2, 10)}, "test_targets"),
        ({"test_targets": offsets(4, 4)}, "test_targets"),
        ({"test_targets": offsets(4)}, "test_targets"),
        ({"user_ids": np.array(["u", "u"])}, "user_ids"),
        ({"user_ids": offsets(1, 2)}, "user_ids"),
        ({"user_ids": np.array("u")}, "user_ids"),
        ({"user_ids": np.array(["u", "v", "w"])}, "user_ids"),
        ({"item_ids": np.array(["a", "b"])}, "items"),
        ({"item_ids": np.array(list("abcdefgh")).reshape(4, 2)}, "item_ids"),
        ({"more": offsets(1)}, "more"),
    ],
)
def test_numbers_that_cannot_be_are_named_by_their_array(tmp_path, changes, array):
    assert array in refusal(older(saved(tmp_path), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id_ends": offsets(2, 1)},
        {"user_id_ends": offsets(2, 5)},
        {"user_id_ends": offsets(-1, 4)},
        {"user_id_ends": offsets()},
        {"user_id_ends": None},
        {"user_ids": np.frombuffer(b"\xff\xfe\xfd\xfc", np.uint8)},
    ],
)
def test_ids_that_do_not_fit_their_ends(tmp_path, changes):
    assert "user_ids" in refusal(changed(saved(tmp_path), **changes))


@pytest.mark.parametrize("name", ["items", "training_ends", "user_ids", "max_inputs", "validation_targets"])
def test_a_changed_number_is_found_by_its_checksum(tmp_path, name):
    """The zip's own checksums fit: the number was changed before the file was packed."""
    path = saved(tmp_path)
    with np.load(path) as file:
        array = file[name].copy()
    array.reshape(-1)[0] ^= 1
    assert f"array {name} is damaged: its checksum does not fit" in refusal(
        changed(path, checksums=True, **{name: array})
    )


def test_arrays_that_have_changed_places_are_found(tmp_path):
    path = saved(tmp_path)
    with np.load(path) as file:
        swapped = {"test_targets": file["validation_targets"], "validation_targets": file["test_targets"]}
    assert "_targets is damaged: its checksum does not fit" in refusal(changed(path, checksums=True, **swapped))


def rewrite(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Replace the bytes of a member."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, old in members.items():
            archive.writestr(member, content if member == f"{name}.npy" else old)
    return path


def array_file(shape: str, descr: str = "<i8", values: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        array_file("(2,)", values=bytes(8)),
        array_file("(999999999999999999,)"),
        array_file("(1,)", descr="<U999999999"),
        array_file("(1,)", descr="|O", values=bytes(8)),
        array_file("(-1,)"),
        array_file("(" * 60 + ")" * 60),
        array_file("(1,)", descr="<i3", values=bytes(3)),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535,
        b"\x93NUMPY\x03\x00" + bytes(100),
    ],
)
def test_headers_that_cannot_be_are_named(tmp_path, content):
    assert "array training_ends" in refusal(rewrite(saved(tmp_path), "training_ends", content))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_method_of_packing_is_refused(tmp_path, method):
    assert "packed by another method" in refusal(rewrite(saved(tmp_path), "items", array_file("(0,)"), method))


def test_what_is_packed_to_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "FREE_BYTES", 1 << 20)
    path = rewrite(saved(tmp_path), "items", array_file("(524288,)", "<i8", bytes(1 << 22)))
    tracemalloc.start()
    assert re.search(r"declares 4[0-9]{6} bytes of arrays in a file of [0-9]{4};", refusal(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_more_ids_than_a_file_can_hold_are_refused(tmp_path):
    path = older(saved(tmp_path), user_ids=np.full(1_100_000, "u"), offsets=np.zeros(1_100_001, np.int64))
    assert "1100000 ids in a file of" in refusal(path)


def test_members_that_stand_twice_or_are_encrypted_are_refused(tmp_path):
    path = saved(tmp_path)
    content = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("items.npy", b"")
    assert "array items stands twice" in refusal(path)
    encrypted = bytearray(content)
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    assert "is encrypted" in refusal(path)


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Return bytes that differ in a few places, or are cut."""
    changed_bytes = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed_bytes[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return bytes(
        changed_bytes[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else changed_bytes
    )


@pytest.mark.parametrize("old", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_anywhere_is_one_line_or_the_same_histories(tmp_path_factory, old, data):
    path = saved(tmp_path_factory.mktemp("damage"))
    if old:
        older(path)
    path.write_bytes(damaged(path.read_bytes(), data))
    try:
        loaded = load_sequences(path)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}: ")
    else:
        assert same(loaded, make_sequences(HISTORIES))


def test_a_missing_file_and_other_files_are_one_line(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.npz")
    assert "expected a regular file, found a folder" in refusal(tmp_path)
    for content in (b"", b"PK", bytes(1000), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.npz").write_bytes(content)
        assert refusal(tmp_path / "x.npz")
