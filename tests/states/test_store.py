"""Check the store: written states come back, views never mix, and a write is whole or absent."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from helpers.stores import fill_store, view_description
from helpers.tables import random_table
from iisan_fast.errors import InputError
from iisan_fast.states import database
from iisan_fast.states import store as hidden_states
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.store import Store

IDS = ["a", "b", "x" * 600, "é/\\ 1"]
ADDS = """
import lmdb, sys
with lmdb.open(sys.argv[1], map_size=1 << 24) as env, env.begin(write=True) as transaction:
    transaction.put(b"new", bytes(1 << 22))
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_come_back_as_they_were(tmp_path, dtype):
    states = torch.randn(4, 3, 5).to(dtype)
    digests = [bytes([i]) * 16 for i in range(4)]
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"v": view_description(3, 5, dtype=str(dtype).removeprefix("torch."))})
        store.write("v", IDS, digests, states)
    with Store(tmp_path / "c") as store:
        assert list(store.digests("v", [*IDS, "none"])) == [*digests, None]
    table = load_table(tmp_path / "c", ["v"], IDS[::-1], torch.device("cpu"))
    assert table.shapes == [(3, 5)] and table.views[0].dtype == dtype
    assert not table.views[0][0].any()
    assert torch.equal(table.views[0][1:], states.flip(0))
    (view,) = table.read(torch.tensor([4, 1]))
    assert torch.equal(view.table[view.rows], states[[0, 3]])


def test_several_views_are_written_in_one_transaction(tmp_path):
    first, second = torch.randn(2, 3, 5), torch.randn(2, 1, 4)
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"v": view_description(3, 5), "w": view_description(1, 4)})
        store.write_views(["a", "b"], [b"1" * 16, b"2" * 16], {"v": first, "w": second})
        assert store._database._env.info()["last_txnid"] == 1
        assert list(store.digests("w", ["b", "a"])) == [b"2" * 16, b"1" * 16]
    table = load_table(tmp_path / "c", ["v", "w"], ["a", "b"], torch.device("cpu"))
    assert torch.equal(table.views[0][1:], first) and torch.equal(table.views[1][1:], second)


def test_the_map_grows_with_what_is_written(tmp_path):
    states = torch.randn(64, 12, 1024)
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"v": view_description(12, 1024)})
        for part in range(4):
            store.write("v", [f"{part}-{i}" for i in range(64)], [b"d" * 16] * 64, states)
    table = load_table(tmp_path / "c", ["v"], [f"3-{i}" for i in range(64)], torch.device("cpu"))
    assert torch.equal(table.views[0][1:], states)


def test_views_made_otherwise_are_refused_and_the_difference_named(tmp_path):
    fill_store(tmp_path / "c", ["a"], random_table([(2, 4)], 1), ("v",))
    before = (tmp_path / "c" / "manifest.json").read_bytes()
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"v": view_description(2, 4, encoder="moved", versions={"torch": "9"})})  # not compared
        changed = view_description(2, 4, pooling="mean", weights="beef")
        with pytest.raises(InputError) as error:
            store.add_views({"new": view_description(1, 1), "v": changed})
    assert "view 'v'" in str(error.value) and 'pooling null there, "mean" now' in str(error.value)
    assert 'weights null there, "beef" now' in str(error.value)
    assert (tmp_path / "c" / "manifest.json").read_bytes() == before


def test_missing_items_are_counted_and_named(tmp_path):
    fill_store(tmp_path / "c", ["a", "b"], random_table([(2, 4)], 2), ("v",))
    with pytest.raises(InputError, match=r"view 'v' lacks 2 of 3 items \(c, d\); run iisan-fast extract"):
        load_table(tmp_path / "c", ["v"], ["a", "c", "d"], torch.device("cpu"))


def test_an_entry_of_another_size_is_refused(tmp_path):
    fill_store(tmp_path / "c", ["a"], random_table([(2, 4)], 1), ("v",))
    with Store(tmp_path / "c", writable=True) as store:
        store.write("v", ["a"], [b"0" * 16], torch.randn(1, 1, 4))
    with pytest.raises(InputError, match="item 'a': expected 32 bytes of states, found 16"):
        load_table(tmp_path / "c", ["v"], ["a"], torch.device("cpu"))


def test_a_check_reads_nothing_and_finds_what_reading_would(tmp_path, monkeypatch):
    fill_store(tmp_path / "c", ["a", "b"], random_table([(2, 4), (3, 4)], 2), ("v", "w"))
    with Store(tmp_path / "c") as store, monkeypatch.context() as patch:
        patch.setattr(hidden_states.np, "frombuffer", None)
        for name in ("v", "w"):
            store.check(name, ["b", "a", "b"])
            store.check(name, [])
        with pytest.raises(InputError, match=r"view 'w' lacks 2 of 4 items \(c, d\); run iisan-fast extract"):
            store.check("w", ["a", "c", "b", "d"])
        with pytest.raises(InputError, match="no view 'x'; it has v, w"):
            store.check("x", ["a"])
    with Store(tmp_path / "c", writable=True) as store:
        store.write("w", ["b"], [b"0" * 16], torch.randn(1, 3, 5))
        store.check("v", ["a", "b"])
        store.check("w", ["a"])
        with pytest.raises(
            InputError,
            match="view 'w', item 'b': expected 48 bytes of states, found 60; iisan-fast extract encodes it again",
        ):
            store.check("w", ["a", "b"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_check_knows_the_size_of_every_dtype(tmp_path, dtype):
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"v": view_description(2, 4, dtype=dtype), "deeper": view_description(3, 4, dtype=dtype)})
        states = torch.randn(1, 2, 4).to(getattr(torch, dtype))
        for name in ("v", "deeper"):
            store.write(name, ["a"], [b"0" * 16], states)
        store.check("v", ["a"])
        size = 4 * states.element_size()
        with pytest.raises(InputError, match=f"expected {3 * size} bytes of states, found {2 * size}"):
            store.check("deeper", ["a"])


@pytest.mark.parametrize("call", ["read", "check", "digests"])
def test_an_open_store_is_read_on_while_another_process_adds_to_it(tmp_path, call):
    """Training may read a mapped table while an extraction writes to the same cache."""
    table = random_table([(2, 4)], 2, torch.float32)
    fill_store(tmp_path / "c", ["a", "b"], table, ("v",))
    with Store(tmp_path / "c") as store:
        subprocess.run([sys.executable, "-c", ADDS, tmp_path / "c" / "states.lmdb"], check=True)
        if call == "read":
            states = torch.empty(2, 2, 4)
            store.read("v", ["b", "a"], states)
            assert torch.equal(states, table.views[0][[2, 1]])
        elif call == "check":
            store.check("v", ["a", "b"])
        else:
            assert None not in list(store.digests("v", ["a", "b"]))


def test_what_is_no_store_is_said_so(tmp_path):
    with pytest.raises(InputError, match="run iisan-fast extract"):
        Store(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder for the cache, found a file"):
        Store(tmp_path / "file", writable=True)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": 99, "views": {}}', "format: expected 1 or 2, found 99; extract into a new cache"),
        ('{"format": 0, "views": {}}', "format: expected 1 or 2, found 0;"),
        ('{"format": "1", "views": {}}', 'format: expected 1 or 2, found "1";'),
        ('{"format": 1.0, "views": {}}', "format: expected 1 or 2, found 1.0;"),
        ('{"format": true, "views": {}}', "format: expected 1 or 2, found true;"),
        ('{"format": null, "views": {}}', "format: expected 1 or 2, found null;"),
        ('{"views": {}}', "format: expected 1 or 2, found nothing;"),
        ('{"format": 1}', "not a manifest"),
        ('{"format": 1, "views": []}', "not a manifest"),
        ('{"format": 1, "views": {"v": 3}}', "not a manifest"),
        ('{"format": 1, "views": {"v": {}}}', "not a manifest"),
        *(
            (
                json.dumps(
                    {
                        "format": 1,
                        "views": {"v": view_description(1, 2, **change)},
                    }
                ),
                "not a manifest",
            )
            for change in ({"unescaped": 1}, {"versions": []}, {"first_layer": "1"}, {"missing_captions": []})
        ),
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, manifest, message):
    fill_store(tmp_path / "c", ["a"], random_table([(2, 4)], 1), ("v",))
    (tmp_path / "c" / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=message):
        Store(tmp_path / "c")


@pytest.mark.parametrize("size", [5000, 40_000])
def test_a_truncated_database_is_refused_and_kills_nothing(tmp_path, size):
    fill_store(tmp_path / "c", [f"i{i}" for i in range(50)], random_table([(2, 512)], 50), ("v",))
    with (tmp_path / "c" / "states.lmdb" / "data.mdb").open("rb+") as file:
        file.truncate(size)
    with pytest.raises(InputError, match="truncated LMDB|cannot be used"):
        Store(tmp_path / "c")


def test_only_one_extraction_writes_at_a_time(tmp_path):
    with Store(tmp_path / "c", writable=True), pytest.raises(InputError, match="another extraction is writing"):
        Store(tmp_path / "c", writable=True)
    Store(tmp_path / "c", writable=True).__exit__()


def test_a_store_killed_at_birth_can_be_opened_again(tmp_path, monkeypatch):
    """Between writing the manifest and the database, the store has no states to lose."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database.lmdb, "open", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "c", writable=True)
    fill_store(tmp_path / "c", ["a"], random_table([(2, 4)], 1), ("v",))
    assert load_table(tmp_path / "c", ["v"], ["a"], torch.device("cpu")).shapes == [(2, 4)]


def test_an_unknown_view_is_named(tmp_path):
    fill_store(tmp_path / "c", ["a"], random_table([(2, 4)], 1), ("v",))
    with pytest.raises(InputError, match="no view 'w'; it has v"):
        load_table(tmp_path / "c", ["w"], ["a"], torch.device("cpu"))


@pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])
def test_a_table_keeps_the_layers_of_its_groups_alone(tmp_path, placement):
    whole = random_table([(5, 3)], 4, torch.float32)
    item_ids = [f"i{number}" for number in range(1, 5)]
    cache = fill_store(tmp_path / "cache", item_ids, whole, ("title",))
    with closing(load_table(cache, ["title"], item_ids, torch.device("cpu"), placement, layer_groups=2)) as table:
        assert table.shapes == [(3, 3)]
        (view,) = table.read(torch.tensor([3, 1]))
        states = view.table if view.rows is None else view.table[view.rows]
        assert torch.equal(states, whole.views[0][[3, 1]][:, [0, 2, 4]])


def test_groups_whose_layers_a_cache_lacks_are_refused(tmp_path):
    table = random_table([(3, 2)], 1, torch.float32)
    cache = fill_store(tmp_path / "cache", ["i1"], table, ("title",), layers=[0, 2, 4], depth=5)
    with pytest.raises(InputError, match="4 of the encoder's 4 blocks are layers 0, 1, 2, 3, 4; .* lacks 1, 3"):
        load_table(cache, ["title"], ["i1"], torch.device("cpu"), layer_groups=4)
