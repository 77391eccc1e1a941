"""Check that damage to a cache is found where states are read, named by verify, and repaired by the next extraction."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import lmdb
import pytest
import torch

from helpers.extractions import entries
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast import api
from iisan_fast.errors import InputError
from iisan_fast.states.entries import DIGEST_BYTES, entry_key
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.manifest import read_manifest
from iisan_fast.states.store import Store
from iisan_fast.states.verification import verify_cache

CPU = torch.device("cpu")
IDS = [f"i{number}" for number in range(6)]
FORMAT_1 = Path(__file__).parents[1] / "format_1" / "cache"
each_placement = pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])


@pytest.fixture
def cache(tmp_path) -> Path:
    """Fill a cache with two views of six items: 48 and 24 bytes of states."""
    return fill_store(tmp_path / "cache", IDS, random_table([(3, 4), (2, 3)], 6), ("a", "b"))


def rewrite(cache: Path, changes: dict[bytes, bytes | None]) -> None:
    """Replace the entries under some keys; None removes one."""
    with lmdb.open(str(cache / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in changes.items():
            transaction.delete(key) if value is None else transaction.put(key, value)


def flip(cache: Path, view: str, item_id: str, byte: int, bit: int = 4) -> None:
    """Flip a bit of an entry."""
    key = entry_key(view, item_id)
    value = bytearray(entries(cache)[key])
    value[byte] ^= 1 << bit
    rewrite(cache, {key: bytes(value)})


def read_all(cache: Path, view: str, placement: str = "device", layer_groups: int | None = None) -> torch.Tensor:
    """Return the states of all items [items, K, D]."""
    with closing(load_table(cache, [view], IDS, CPU, placement, layer_groups=layer_groups)) as table:
        (states,) = table.read(torch.arange(1, len(IDS) + 1))
        return states.table if states.rows is None else states.table[states.rows]


def damaged(cache: Path) -> list[tuple[str, str]]:
    """Return where and why, as verify names it."""
    return [(damage.where, damage.problem) for damage in verify_cache(cache).damage]


@each_placement
@pytest.mark.parametrize("byte", [0, DIGEST_BYTES - 1, DIGEST_BYTES, 40, -9, -8, -1], ids=str)
def test_a_flipped_bit_in_any_part_of_an_entry_is_found_where_it_is_read(cache, placement, byte):
    sound = read_all(cache, "b")
    flip(cache, "a", "i3", byte)
    message = "cache: view 'a', item 'i3': the checksum of its states does not fit; iisan-fast extract encodes it again"
    with pytest.raises(InputError, match=message):
        read_all(cache, "a", placement)
    assert torch.equal(read_all(cache, "b", placement), sound)
    assert damaged(cache) == [("states.lmdb: view 'a', item 'i3'", "the checksum of its states does not fit")]


@each_placement
def test_a_flip_in_a_layer_that_is_not_read_is_found_too(cache, placement):
    flip(cache, "a", "i0", DIGEST_BYTES + 17)  # the second of three layers
    with pytest.raises(InputError, match="view 'a', item 'i0'"):
        read_all(cache, "a", placement, layer_groups=1)


def test_entries_that_have_changed_places_are_found(cache):
    first, second = entry_key("a", "i1"), entry_key("a", "i4")
    stored = entries(cache)
    rewrite(cache, {first: stored[second], second: stored[first]})
    with pytest.raises(InputError, match="view 'a', item 'i1'"):
        read_all(cache, "a")
    assert [where for where, _ in damaged(cache)] == [f"states.lmdb: view 'a', item {i!r}" for i in ("i1", "i4")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value[:-1], "expected 48 bytes of states, found 47"),
        (lambda value: value[:-8], "expected 48 bytes of states, found 40"),
        (lambda value: value + b"\0", "expected 48 bytes of states, found 49"),
        (lambda value: b"", "expected 48 bytes of states, found 0"),
        (lambda value: value[:DIGEST_BYTES], "expected 48 bytes of states, found 0"),
        (lambda value: bytes(len(value)), "the checksum of its states does not fit"),
    ],
    ids=["a byte less", "no checksum", "a byte more", "empty", "a digest", "zeros"],
)
def test_an_entry_of_another_length_or_of_zeros_is_found(cache, change: Callable, message):
    key = entry_key("a", "i2")
    rewrite(cache, {key: change(entries(cache)[key])})
    with pytest.raises(InputError, match=f"view 'a', item 'i2': {message}; iisan-fast extract encodes it again"):
        read_all(cache, "a")
    assert damaged(cache) == [("states.lmdb: view 'a', item 'i2'", message)]


def test_verify_counts_what_is_sound_and_names_each_damaged_entry(cache):
    sound = verify_cache(cache)
    assert (sound.kind, sound.path, sound.checked, sound.added, sound.unchecked) == ("cache", cache, 13, 0, 0)
    assert not sound.damage
    before = entries(cache)
    key = entry_key("a", "x" * 600)
    rewrite(cache, {key: bytes(72), entry_key("c", "i1"): before[entry_key("a", "i1")]})
    flip(cache, "b", "i5", 20)
    result = verify_cache(cache)
    assert result.checked == 15 and len(result.damage) == 3
    assert [damage.where.split(", item")[0] for damage in result.damage] == [
        f"states.lmdb: view {view!r}" for view in ("a", "b", "c")
    ]
    assert key[3:].hex() in result.damage[0].where  # a long id is stored as its hash
    assert result.damage[2].problem == "the cache has no view of this name"


def test_names_in_messages_hold_no_control_characters(cache):
    rewrite(cache, {b"a\0\x1b[31m\n\xff": bytes(72)})
    assert damaged(cache)[0][0] == "states.lmdb: view 'a', item '\\x1b[31m\\n\\\\xff'"


# The manifest


def test_every_flipped_bit_of_a_manifest_is_refused_or_changes_nothing(cache):
    path = cache / "manifest.json"
    content = path.read_bytes()
    manifest = read_manifest(cache)
    refused = 0
    for byte in range(len(content)):
        for bit in range(8) if byte % 40 == 0 else (byte % 8,) if byte % 3 == 0 else ():
            path.write_bytes(content[:byte] + bytes([content[byte] ^ (1 << bit)]) + content[byte + 1 :])
            try:
                assert read_manifest(cache) == manifest
            except InputError as error:
                assert "manifest.json" in str(error)
                refused += 1
    assert refused > len(content) / 6


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [0, 2]},
        {"width": 5},
        {"depth": 9},
        {"dtype": "bfloat16"},
        {"source": "caption"},
        {"encoder": "other"},
        {"weights": "00"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_edited_manifest_is_refused(cache, changes):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["views"]["a"] |= changes
    path.write_text(json.dumps(manifest))
    for use in (Store, verify_cache, lambda cache: Store(cache, writable=True)):
        with pytest.raises(InputError, match="manifest.json: its checksum does not fit, so it was damaged or edited"):
            use(cache)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": [1, 0]},
        {"layers": [0, 0]},
        {"layers": [0, 9]},
        {"layers": [-1, 0]},
        {"layers": "01"},
        {"layers": [True]},
        {"layers": [[0]]},
        {"width": 0},
        {"width": 4.0},
        {"width": None},
        {"depth": "9"},
        {"dtype": "float99"},
        {"dtype": []},
        {"source": "sound"},
        {"source": {}},
    ],
    ids=str,
)
def test_a_manifest_of_format_1_with_values_that_cannot_be_is_refused(cache, changes):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["views"]["a"] |= changes
    path.write_text(json.dumps({"format": 1, "views": manifest["views"]}))
    with pytest.raises(InputError, match="manifest.json: not a manifest of hidden states"):
        Store(cache)


# Format 1


@pytest.fixture
def old(tmp_path) -> Path:
    """Copy the cache that a version without checksums made: two views of ten items."""
    return Path(shutil.copytree(FORMAT_1, tmp_path / "old"))


def old_ids(cache: Path) -> list[str]:
    return [key.split(b"\0")[1].decode() for key in entries(cache) if key.startswith(b"first\0")]


@each_placement
def test_an_old_cache_opens_and_one_warning_says_what_adds_checksums(old, placement, caplog):
    item_ids = old_ids(old)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with closing(load_table(old, ["first", "second"], item_ids, CPU, placement)) as table:
                table.read(torch.arange(1, len(item_ids) + 1))
    (record,) = caplog.records
    assert record.getMessage() == f"{old}: the cache was made without checksums; iisan-fast verify {old} adds them"


def test_verify_adds_checksums_to_an_old_cache_and_changes_nothing_else(old, caplog):
    before = entries(old)
    item_ids = old_ids(old)
    only_checked = verify_cache(old, add=False)
    assert (only_checked.added, only_checked.unchecked) == (0, len(before)) and entries(old) == before
    result = verify_cache(old)
    assert (result.checked, result.added, result.unchecked) == (1, len(before), 0) and not result.damage
    after = entries(old)
    assert {key: value[:-8] for key, value in after.items()} == before
    assert read_manifest(old) == {**read_manifest(FORMAT_1), "format": 2}
    again = verify_cache(old)
    assert (again.checked, again.added) == (1 + len(before), 0) and entries(old) == after
    load_table(old, ["first"], item_ids, CPU)
    assert not caplog.records
    flip(old, "first", item_ids[0], 30)
    with pytest.raises(InputError, match="the checksum of its states does not fit"):
        load_table(old, ["first"], item_ids, CPU)


def test_new_entries_of_an_old_cache_have_checksums_and_are_checked(old):
    first, *others = old_ids(old)
    with Store(old, writable=True) as store:
        store.write("first", [first], [b"d" * 16], torch.ones(1, 2, 64, dtype=torch.bfloat16))
    assert json.loads((old / "manifest.json").read_text())["format"] == 1
    assert load_table(old, ["first"], [first, others[0]], CPU).views[0][1].eq(1).all()
    result = verify_cache(old, add=False)
    assert (result.checked, result.unchecked) == (2, len(entries(old)) - 1)
    flip(old, "first", first, 20)
    with pytest.raises(InputError, match=f"item {first!r}: the checksum"):
        load_table(old, ["first"], [first], CPU)
    assert verify_cache(old).damage[0].where == f"states.lmdb: view 'first', item {first!r}"


def test_verify_that_was_killed_while_it_added_goes_on(old, monkeypatch):
    def killed(store, keys, add=Store.add_checksums):
        add(store, keys[:5])
        raise KeyboardInterrupt

    count = len(entries(old))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "add_checksums", killed)
        verify_cache(old)
    load_table(old, ["first", "second"], old_ids(old), CPU)
    result = verify_cache(old)
    assert (result.checked, result.added) == (6, count - 5) and not result.damage


def test_verify_and_an_extraction_exclude_each_other_where_verify_writes(old, cache):
    with Store(old, writable=True), pytest.raises(InputError, match="another extraction is writing to this cache"):
        verify_cache(old)
    with pytest.raises(InputError, match="not a cache"):
        verify_cache(old.parent)


def test_the_public_function_decides_by_what_the_folder_holds(cache, tmp_path):
    assert api.verify(str(cache)).kind == "cache"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: expected a cache \(manifest.json\)"):
        api.verify(tmp_path / "empty")
    (cache / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"states.lmdb without manifest.json; restore that file"):
        api.verify(cache)
