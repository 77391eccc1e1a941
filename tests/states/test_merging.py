"""Check merging: shards become the cache that one process makes, and a kill leaves shards or that cache."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from pathlib import Path

import lmdb
import pytest
import torch

from helpers.extractions import entries
from helpers.stores import fill_shards, fill_store, view_description
from helpers.tables import random_table
from iisan_fast.errors import InputError, Stopped
from iisan_fast.states import merging
from iisan_fast.states.database import Database
from iisan_fast.states.entries import entry_key, key_names
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.manifest import read_manifest, read_shard_count, write_manifest
from iisan_fast.states.merging import merge_shards
from iisan_fast.states.shards import Shard, all_shards
from iisan_fast.states.store import Store
from iisan_fast.states.verification import verify_cache

IDS = [*(f"i{number}" for number in range(60)), "x" * 600]
VIEWS = ("v", "w")
ENTRIES = len(VIEWS) * len(IDS)


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


def change(folder: Path, key: bytes, value: bytes) -> None:
    """Write an entry into the database of a store."""
    with lmdb.open(str(folder / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.put(key, value)


def first_entry(folder: Path) -> tuple[bytes, bytes]:
    """Return the first key and value of a store."""
    return next(iter(entries(folder).items()))


def files_of(cache: Path) -> dict[str, bytes]:
    """Return the content of all files of a cache but its locks, by their names."""
    files = (path for path in cache.rglob("*") if path.is_file() and not path.name.startswith("lock"))
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def test_merged_shards_are_the_cache_of_one_process(both, shards):
    merged = merge_shards(shards)
    assert merged == merging.Merged(str(shards), 3, ENTRIES, sum(map(len, entries(both[0]).values())))
    assert entries(shards) == entries(both[0])
    assert (shards / "manifest.json").read_bytes() == (both[0] / "manifest.json").read_bytes()
    assert {path.name for path in shards.iterdir()} == {"manifest.json", "states.lmdb", "lock"}
    with Store(shards) as store, Store(both[0]) as one:
        assert [store.contents(view, IDS) for view in VIEWS] == [one.contents(view, IDS) for view in VIEWS]
    assert not verify_cache(shards).damage
    with pytest.raises(InputError, match="c: the cache has no shards, so there is nothing to merge"):
        merge_shards(shards)


def test_an_open_table_reads_on_after_its_shards_were_replaced_by_one_store(both, shards):
    """A process opens a database once, so the end of a merge is played here."""
    table = load_table(shards, ["v"], IDS, torch.device("cpu"), "mapped")
    whole = load_table(both[0], ["v"], IDS, torch.device("cpu"))
    shutil.copytree(both[0], shards, dirs_exist_ok=True)
    merging._remove_shards(shards, 3)
    assert not (shards / "shards").exists()
    items = torch.tensor([61, 2, 7])
    assert torch.equal(table.read(items)[0].table, whole.views[0][items])
    table.close()


def test_groups_end_at_a_number_of_entries_or_bytes(shards, both, monkeypatch):
    sizes = []
    put = Database.put
    monkeypatch.setattr(Database, "put", lambda self, group: (sizes.append(len(group)), put(self, group)))
    monkeypatch.setattr(merging, "GROUP_ITEMS", 50)
    merge_shards(Path(shutil.copytree(shards, shards.with_name("d"))))
    assert sizes == [50, 50, ENTRIES - 100]
    monkeypatch.setattr(merging, "GROUP_BYTES", 100)
    merge_shards(shards)
    assert max(sizes[3:]) == 2 and entries(shards) == entries(both[0])


class Killed(BaseException):
    """A kill, which no code catches."""


def kills(cache: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Merge, and end at a stage as a kill does: nothing is tidied up."""
    real = {"put": Database.put, "rmtree": shutil.rmtree, "write_manifest": merging.write_manifest}
    calls = itertools.count(1)
    name, _, number = stage.partition(" ")
    with monkeypatch.context() as patch:

        def counted(*arguments, **options):
            if next(calls) == int(number):
                patch.setattr("shutil.rmtree", lambda *_: None)  # what a kill leaves behind
                raise Killed
            return real[name](*arguments, **options)

        if name == "put":
            patch.setattr(Database, "put", counted)
        elif name == "rmtree":
            patch.setattr(merging.shutil, "rmtree", counted)
        else:
            patch.setattr(merging, "write_manifest", counted)
        patch.setattr(merging, "GROUP_ITEMS", 50)
        with pytest.raises(Killed):
            merge_shards(cache)


@pytest.mark.parametrize(
    ("stage", "is_merged"),
    [
        ("put 1", False),
        ("put 3", False),
        ("write_manifest 1", False),  # the merged database has its name already
        ("rmtree 2", True),  # 1 is of the temporary folder
        ("rmtree 3", True),
        ("write_manifest 2", True),
    ],
)
def test_a_killed_merge_leaves_shards_or_one_cache_and_the_next_one_ends_it(
    both, shards, monkeypatch, stage, is_merged
):
    kills(shards, monkeypatch, stage)
    assert (read_shard_count(shards) is None) == is_merged
    with Store(shards) as store, Store(both[0]) as one:
        assert [(key, bytes(value)) for key, value in store.entries()] == [
            (key, bytes(value)) for key, value in one.entries()
        ]
        assert store.contents("v", IDS) == one.contents("v", IDS)
    merged = merge_shards(shards)
    assert (merged.shards, merged.entries) == (3, 0 if is_merged else ENTRIES)
    assert entries(shards) == entries(both[0])
    assert (shards / "manifest.json").read_bytes() == (both[0] / "manifest.json").read_bytes()
    assert {path.name for path in shards.iterdir()} == {"manifest.json", "states.lmdb", "lock"}


def test_a_signal_stops_a_merge_and_leaves_the_shards(shards, monkeypatch):
    before = files_of(shards)
    monkeypatch.setattr(merging, "GROUP_ITEMS", 50)
    put = Database.put
    monkeypatch.setattr(Database, "put", lambda *arguments: (put(*arguments), signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Stopped, match="c: is still in 3 shards; nothing was changed"):
        merge_shards(shards)
    assert files_of(shards) == before


def test_damage_is_named_and_nothing_is_merged(shards):
    folder = shards / "shards" / "2-of-3"
    key, value = first_entry(folder)
    change(folder, key, value[:20] + bytes([value[20] ^ 1]) + value[21:])
    before = files_of(shards)
    view, item_id = key_names(key)
    with pytest.raises(InputError, match=rf"2-of-3: view '{view}', item '{item_id}': the checksum of .* --shard 2/3"):
        merge_shards(shards)
    assert files_of(shards) == before
    change(folder, key, value)
    assert merge_shards(shards).entries == ENTRIES


def test_an_entry_of_another_shard_is_refused_and_one_of_no_view_is_left_out(shards, caplog):
    first, second = (shards / "shards" / f"{number}-of-3" for number in (1, 2))
    change(second, entry_key("lost", "i1"), b"content")
    key, value = first_entry(first)
    change(second, key, value)
    with pytest.raises(InputError, match="2-of-3: view 'v', item 'i.*': belongs to another shard"):
        merge_shards(shards)
    with lmdb.open(str(second / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.delete(key)
    assert merge_shards(shards).entries == ENTRIES
    assert "view 'lost', item 'i1': the cache has no view of this name; the entry is left out" in caplog.text


def test_shards_that_are_not_complete_are_refused_with_the_command_that_completes_them(shards):
    folder = shards / "shards" / "2-of-3"
    manifest = read_manifest(folder)
    before = files_of(shards)
    cases = {
        "shard 2 of 3 is unfinished; .* --shard 2/3 goes on with it": {**manifest, "unfinished": True},
        "shard 2 of 3 lacks view 'w'; .* --shard 2/3 makes it": {**manifest, "views": {"v": manifest["views"]["v"]}},
        "view 'v' of shard 2 of 3 was made with other settings": {
            **manifest,
            "views": manifest["views"] | {"v": view_description(2, 4, pooling="mean")},
        },
    }
    for expected, changed in cases.items():
        write_manifest(folder, changed)
        with pytest.raises(InputError, match=expected):
            merge_shards(shards)
    write_manifest(folder, manifest)
    assert files_of(shards) == before
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="shard 2 of 3 is missing; .* --shard 2/3 makes it"):
        merge_shards(shards)


def test_a_merge_needs_room_and_no_writer(shards, monkeypatch):
    before = files_of(shards)
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 20_000))
        with pytest.raises(InputError, match=r"c: merging needs .* for a second copy, found .*; make room"):
            merge_shards(shards)
    shard = Shard(2, 3)
    with (
        Store(shard.folder(shards), writable=True, shard=shard),
        pytest.raises(InputError, match="2-of-3: an extraction is writing to this shard"),
    ):
        merge_shards(shards)
    assert files_of(shards) == before


def test_no_cache_is_refused_and_not_begun(tmp_path):
    with pytest.raises(InputError, match="none: not a cache of hidden states"):
        merge_shards(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_shards_of_another_number_stay(shards, both):
    other = shards / "shards" / "1-of-2"
    fill_store(other, IDS[:2], random_table([(2, 4)], 2), ("v",), Shard(1, 2))
    merge_shards(shards)
    assert read_manifest(other)["shard"] == "1 of 2" and entries(shards) == entries(both[0])
    assert json.loads((shards / "manifest.json").read_text())["format"] == 2
    assert not any(shard.folder(shards).exists() for shard in all_shards(3))
