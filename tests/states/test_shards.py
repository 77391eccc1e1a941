"""Check shards: an item's place is stable, and all shards are read as one cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lmdb
import pytest
import torch

from helpers.stores import fill_shards, fill_store, view_description
from helpers.tables import random_table
from iisan_fast.errors import InputError
from iisan_fast.states.entries import key_names
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.manifest import read_manifest, write_manifest, write_shard_count
from iisan_fast.states.shards import Shard, all_shards, parsed_shard, shard_of
from iisan_fast.states.store import Store
from iisan_fast.states.verification import verify_cache

CPU = torch.device("cpu")
IDS = [*(f"i{number}" for number in range(40)), "x" * 600, "é/\\ 1"]
VIEWS = ("v", "w")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """Return the same states as one cache and in three shards."""
    root = tmp_path_factory.mktemp("caches")
    table = random_table([(2, 4), (3, 5)], len(IDS))
    return fill_store(root / "one", IDS, table, VIEWS), fill_shards(root / "shards", IDS, table, VIEWS, 3)


@pytest.fixture
def shards(both, tmp_path) -> Path:
    """Return a copy of the cache in three shards."""
    return Path(shutil.copytree(both[1], tmp_path / "c"))


def test_the_place_of_an_item_depends_on_its_id_alone():
    """These places are in the caches of users: they never change."""
    places = [shard_of(item_id, 4) for item_id in ("B0001", "B0002", "i1", "é", "x" * 600)]
    assert places == [1, 2, 2, 3, 1]


def test_shards_are_disjoint_and_complete_and_of_about_equal_size():
    ids = [f"B{number:07}" for number in range(20_000)]
    for count in (1, 2, 7):
        sizes = [sum(map(shard.holds, ids)) for shard in all_shards(count)]
        assert sum(sizes) == len(ids)
        assert max(sizes) - min(sizes) < 0.1 * len(ids) / count


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4 ", "1/1001", "١/٤", ""])
def test_a_text_that_names_no_shard_is_refused(text):
    with pytest.raises(InputError, match="shard: expected K/N, with K from 1 to N"):
        parsed_shard(text)


def test_a_shard_is_named_as_its_folder():
    shard = parsed_shard("2/4")
    assert (shard, str(shard), shard.folder(Path("c"))) == (Shard(2, 4), "2 of 4", Path("c/shards/2-of-4"))


@pytest.mark.parametrize("placement", ["device", "mapped"])
@pytest.mark.parametrize("standardise", [False, True])
def test_shards_give_the_table_of_one_cache(both, placement, standardise):
    items = torch.tensor([5, 41, 42, 1, 0])
    tables = [load_table(path, VIEWS, IDS, CPU, placement, standardise=standardise) for path in both]
    for one, other in zip(*(table.read(items) for table in tables)):
        selected = [view.table if view.rows is None else view.table[view.rows] for view in (one, other)]
        assert torch.equal(*selected) and selected[0][0].any()
    for table in tables:
        table.close()


def test_shards_have_the_digests_and_entries_of_one_cache(both):
    with Store(both[0]) as one, Store(both[1]) as shards:
        assert dict(one.views) == dict(shards.views) and list(shards.views) == ["v", "w"]
        for view in VIEWS:
            assert one.contents(view, IDS) == shards.contents(view, IDS) != one.contents(view, IDS[::-1])
            assert list(shards.digests(view, ["none", "i3"])) == [None, *one.digests(view, ["i3"])]
            assert list(shards.sound_digests(view, IDS)) == list(one.sound_digests(view, IDS))
            shards.check(view, IDS)
        entries = [(key, bytes(value)) for key, value in shards.entries()]
        assert entries == [(key, bytes(value)) for key, value in one.entries()] and len(entries) == 2 * len(IDS)


def test_a_shard_without_items_is_complete(tmp_path):
    table = random_table([(2, 4)], 2)
    path = fill_shards(tmp_path / "c", ["a", "b"], table, ("v",), 5)
    assert torch.equal(load_table(path, ["v"], ["b", "a"], CPU).views[0][1:], table.views[0][[2, 1]].float())


def test_a_shard_that_is_missing_or_incomplete_is_named_with_its_command(shards):
    mine = [item_id for item_id in IDS if Shard(2, 3).holds(item_id)]
    others = [item_id for item_id in IDS if Shard(1, 3).holds(item_id)]
    with Store(shards) as store:
        with pytest.raises(
            InputError, match=r"lacks 1 of 43 items \(.*\); all of shard . of 3; run iisan-fast extract"
        ):
            store.check("v", [*IDS, "new"])
        with pytest.raises(InputError, match=r"lacks 9 of 51 items .*; of shards 1, 2, 3 of 3; run iisan-fast extract"):
            store.check("v", [*IDS, *(f"new{number}" for number in range(9))])
    shutil.rmtree(shards / "shards" / "2-of-3" / "states.lmdb")
    for _ in range(2):
        with pytest.raises(InputError, match=r"c: shard 2 of 3 is missing; .* --cache \S*/c --shard 2/3 makes it"):
            Store(shards)
        shutil.rmtree(shards / "shards" / "2-of-3", ignore_errors=True)
    fill_store(shards / "shards" / "2-of-3", mine[1:], random_table([(2, 4)], len(mine) - 1), ("v",), Shard(2, 3))
    with Store(shards) as store:
        store.check("v", others)
        with pytest.raises(InputError, match=rf"view 'v' lacks 1 of 42 items \({mine[0]}\); all of shard 2 of 3"):
            store.check("v", IDS)
        with pytest.raises(InputError, match=r"shard 2 of 3 lacks view 'w'; .* --shard 2/3 makes it"):
            store.view("w")


def test_shards_that_do_not_fit_together_are_refused(shards, caplog):
    folder = shards / "shards" / "2-of-3"
    manifest = read_manifest(folder)
    write_manifest(
        folder, {**manifest, "views": manifest["views"] | {"v": view_description(2, 4, versions={"a": "2"})}}
    )
    Store(shards).close()
    assert "shards 1 and 2 of 3 of view 'v' have other library versions" in caplog.text
    write_manifest(folder, {**manifest, "views": manifest["views"] | {"v": view_description(2, 4, pooling="mean")}})
    with pytest.raises(InputError, match="view 'v' of shard 2 of 3 was made with other settings than that of shard 1"):
        Store(shards)
    write_manifest(folder, {**manifest, "shard": "1 of 3"})
    with pytest.raises(InputError, match="2-of-3/manifest.json: expected shard 2 of 3, found 1 of 3"):
        Store(shards)
    shutil.rmtree(folder)
    fill_store(folder, IDS, random_table([(2, 4)], len(IDS)), ("v",))
    with pytest.raises(InputError, match="2-of-3/manifest.json: expected shard 2 of 3, found no shard"):
        Store(shards)


def test_the_manifest_of_shards_is_checked(shards):
    file = shards / "manifest.json"
    with pytest.raises(InputError, match="format: expected 1 or 2, found 3"):  # in versions without shards too
        read_manifest(shards)
    with pytest.raises(InputError, match="the cache is in 3 shards, and is not written as one"):
        Store(shards, writable=True)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "shards": 2}))
    with pytest.raises(InputError, match="manifest.json: its checksum does not fit"):
        Store(shards)
    file.unlink()
    for writable in (False, True):
        with pytest.raises(InputError, match="c: shards without manifest.json; restore that file"):
            Store(shards, writable)
    write_shard_count(shards, 3)
    Store(shards).close()


def test_damage_in_a_shard_is_found_where_it_lies(shards):
    whole = verify_cache(shards)
    assert (whole.damage, whole.checked) == ([], 1 + 3 + 2 * len(IDS))
    folder = shards / "shards" / "3-of-3"
    with lmdb.open(str(folder / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        key, value = next(iter(transaction.cursor()))
        transaction.put(key, value[:20] + bytes([value[20] ^ 1]) + value[21:])
    (damage,) = verify_cache(shards).damage
    view, item_id = key_names(key)
    assert damage.where == f"shards/3-of-3/states.lmdb: view {view!r}, item {item_id!r}"
    with Store(shards) as store, pytest.raises(InputError, match=f"item '{item_id}': the checksum of its states"):
        store.read(view, [item_id], torch.empty(1, *{"v": (2, 4), "w": (3, 5)}[view]))
