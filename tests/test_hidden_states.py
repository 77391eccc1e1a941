"""The store: what is written comes back, views never mix, nothing is half there."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import fill_store, random_table, view_description

from iisan_fast.errors import InputError
from iisan_fast.hidden_states import Store, load_table

IDS = ["a", "b", "x" * 600, "é/\\ 1"]


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
    assert torch.equal(table.gather(torch.tensor([4, 1]))[0], states[[0, 3]])


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


def test_what_is_no_store_is_said_so(tmp_path):
    with pytest.raises(InputError, match="run iisan-fast extract"):
        Store(tmp_path / "nothing")
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({})
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(json.dumps({"format": 99, "views": {}}))
    with pytest.raises(InputError, match="format 99, expected 1"):
        Store(tmp_path / "c")
    manifest.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Store(tmp_path / "c")


def test_an_unknown_view_is_named(tmp_path):
    fill_store(tmp_path / "c", ["a"], random_table([(2, 4)], 1), ("v",))
    with pytest.raises(InputError, match="no view 'w'; it has v"):
        load_table(tmp_path / "c", ["w"], ["a"], torch.device("cpu"))
