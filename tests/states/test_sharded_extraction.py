"""Check extraction in shards: ranks fill them, one is made again alone, and the states are those of one process."""

from __future__ import annotations

import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.datasets import make_sequences, write_dataset_folder
from helpers.extractions import entries
from helpers.fake_encoders import FakeBackbone
from helpers.rank_extractions import dry_and_wet, fill, messages
from helpers.rank_processes import run_on_ranks
from iisan_fast.config import ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError, Stopped
from iisan_fast.states import extraction_parts
from iisan_fast.states.extraction import Extracted
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.manifest import read_manifest
from iisan_fast.states.shards import Shard, all_shards
from iisan_fast.states.store import Store

COUNT = 23
TITLE = ViewConfig("title", "title", "an encoder")
IMAGE = ViewConfig("image", "image", "an encoder")
VIEWS = (IMAGE, TITLE)


def write_dataset(folder: Path, count: int) -> Path:
    """Write a dataset of items with one-colour images, and return its folder."""
    root = write_dataset_folder(folder, make_sequences([list(range(1, count + 1))], max_inputs=count))
    (root / "users.tsv").write_text(
        "".join(f"u{n}\t{' '.join(f'i{n + k}' for k in range(6))}\n" for n in range(1, count - 4))
    )
    (root / "images").mkdir(exist_ok=True)
    for number in range(1, count + 1):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(root / "images" / f"i{number}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a dataset of 23 items."""
    return write_dataset(tmp_path_factory.mktemp("data") / "d", COUNT)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    """Return the cache that one process makes."""
    cache = tmp_path_factory.mktemp("whole") / "c"
    fill(root=root, cache=cache, views=VIEWS)
    return cache


@pytest.fixture(scope="module")
def filled(root, tmp_path_factory) -> Path:
    """Return the cache in two shards that two ranks make."""
    cache = tmp_path_factory.mktemp("filled") / "c"
    results = run_on_ranks(2, partial(fill, root=root, cache=cache, views=VIEWS))
    sizes = [len(items_of(shard, root)) for shard in all_shards(2)]
    assert [len(seen) for _, seen in results] == [2 * size for size in sizes] and min(sizes) > 0
    assert [counts for counts, _ in results] == [all_encoded(COUNT)] * 2
    return cache


@pytest.fixture
def shards(filled, tmp_path) -> Path:
    """Return a copy of the cache in two shards."""
    return Path(shutil.copytree(filled, tmp_path / "c"))


def items_of(shard: Shard, root: Path) -> list[str]:
    """Return the ids of the items of a shard."""
    return [item_id for item_id in load_dataset(root).sequences.item_ids if shard.holds(item_id)]


def all_encoded(count: int, blank: int | None = 0) -> list[Extracted]:
    """Return the counts of an extraction that encodes all of `count` items; a state has 48 bytes."""
    return [Extracted(view.name, count, count, blank, 48 * count) for view in VIEWS]


def encoded(**options) -> list[tuple[int, int]]:
    """Extract in this process, and return (items, encoded) of each view."""
    counts, _ = fill(views=VIEWS, **options)
    return [(count.items, count.encoded) for count in counts]


def joined_entries(cache: Path) -> dict[bytes, bytes]:
    """Return the keys and values of all shards of a cache."""
    with Store(cache) as store:
        return {key: bytes(value) for key, value in store.entries()}


def test_ranks_store_what_one_process_stores(filled, whole, root):
    assert joined_entries(filled) == entries(whole)
    item_ids = load_dataset(root).sequences.item_ids
    with Store(filled) as store, Store(whole) as one:
        assert store.views == one.views and list(store.views) == ["image", "title"]
        assert [store.contents(name, item_ids) for name in one.views] == [
            one.contents(name, item_ids) for name in one.views
        ]
    for shard in all_shards(2):
        manifest = read_manifest(shard.folder(filled))
        assert manifest["shard"] == str(shard) and "unfinished" not in manifest


def test_ranks_encode_new_items_alone_also_if_there_are_more_or_fewer_ranks_than_shards(shards, tmp_path):
    grown = write_dataset(tmp_path / "grown", COUNT + 7)
    options = {"root": grown, "cache": shards, "views": VIEWS}
    results = run_on_ranks(3, partial(dry_and_wet, **options))
    for run, blank in enumerate((None, 0)):
        expected = [Extracted(view.name, COUNT + 7, 7, blank, 48 * 7) for view in VIEWS]
        assert [of_rank[run][0] for of_rank in results] == [expected] * 3
    encoded_here = [len(seen) for _, (_, seen) in results]
    assert sum(encoded_here) == 14 and not encoded_here[2]
    fill(root=grown, cache=tmp_path / "one", views=VIEWS)
    assert joined_entries(shards) == entries(tmp_path / "one")
    assert encoded(root=grown, cache=shards) == [(COUNT + 7, 0)] * 2


def test_one_process_goes_on_with_all_shards(shards, whole, root):
    shutil.rmtree(shards / "shards" / "1-of-2")
    assert encoded(root=root, cache=shards, dry_run=True) == [(COUNT, len(items_of(Shard(1, 2), root)))] * 2
    assert not (shards / "shards" / "1-of-2").exists()
    assert encoded(root=root, cache=shards) == [(COUNT, len(items_of(Shard(1, 2), root)))] * 2
    assert joined_entries(shards) == entries(whole)


def test_a_lost_shard_is_made_again_alone(shards, whole, root):
    shutil.rmtree(shards / "shards" / "2-of-2")
    item_ids = load_dataset(root).sequences.item_ids
    with pytest.raises(InputError, match="shard 2 of 2 is missing; iisan-fast extract DATASET --cache .* --shard 2/2"):
        load_table(shards, ["title"], item_ids, torch.device("cpu"))
    size = len(items_of(Shard(2, 2), root))
    assert encoded(root=root, cache=shards, shard=Shard(2, 2)) == [(size, size)] * 2
    assert encoded(root=root, cache=shards, shard=Shard(2, 2)) == [(size, 0)] * 2
    assert joined_entries(shards) == entries(whole)


def test_shards_are_begun_one_by_one_in_any_order(root, tmp_path, whole):
    for number in (3, 1, 2):
        fill(root=root, cache=tmp_path / "c", views=VIEWS, shard=Shard(number, 3))
    assert joined_entries(tmp_path / "c") == entries(whole)


def test_fewer_items_than_ranks_leave_shards_that_are_empty_and_complete(tmp_path):
    root = write_dataset(tmp_path / "d", 6)
    empty = [shard for shard in all_shards(8) if not items_of(shard, root)]
    assert empty
    for shard in all_shards(8):
        fill(root=root, cache=tmp_path / "c", views=VIEWS, shard=shard)
    for shard in empty:
        assert "unfinished" not in read_manifest(shard.folder(tmp_path / "c"))
    fill(root=root, cache=tmp_path / "one", views=VIEWS)
    assert joined_entries(tmp_path / "c") == entries(tmp_path / "one")


def test_a_stopped_shard_is_unfinished_and_goes_on(shards, root, monkeypatch, whole):
    shutil.rmtree(shards / "shards" / "1-of-2")
    encode = FakeBackbone.encode

    def signalled(self, inputs):
        signal.raise_signal(signal.SIGTERM)
        return encode(self, inputs)

    monkeypatch.setattr(FakeBackbone, "encode", signalled)
    with pytest.raises(Stopped, match=r"c/shards/1-of-2: 4 of \d+ items of image are stored; the same command goes on"):
        fill(root=root, cache=shards, views=VIEWS, shard=Shard(1, 2))
    assert read_manifest(Shard(1, 2).folder(shards))["unfinished"] is True
    monkeypatch.undo()
    size = len(items_of(Shard(1, 2), root))
    assert encoded(root=root, cache=shards, shard=Shard(1, 2)) == [(size, size - 4), (size, size)]
    assert "unfinished" not in read_manifest(Shard(1, 2).folder(shards))
    assert joined_entries(shards) == entries(whole)


def test_what_does_not_fit_the_cache_is_one_line_and_nothing_is_written(shards, whole, root, tmp_path):
    options = {"root": root, "views": VIEWS}
    before = (shards / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="c: the cache has 2 shards, expected 3; name one of its shards"):
        fill(cache=shards, shard=Shard(1, 3), **options)
    with pytest.raises(InputError, match="c: the cache has no shards, expected 3; leave shard out"):
        fill(cache=whole, shard=Shard(1, 3), **options)
    shutil.rmtree(shards / "shards" / "2-of-2")
    other = ViewConfig("title", "title", "an encoder", pooling="mean")
    with pytest.raises(InputError, match="shards/1-of-2: view 'title' was made with other settings: pooling null"):
        fill(root=root, cache=shards, views=(other,), shard=Shard(2, 2))
    (shards / "manifest.json").unlink()
    with pytest.raises(InputError, match="c: shards without manifest.json; restore that file"):
        fill(cache=shards, **options)
    assert not (shards / "shards" / "2-of-2").exists()
    fill(cache=shards, shard=Shard(2, 2), **options)
    assert (shards / "manifest.json").read_bytes() == before and joined_entries(shards) == entries(whole)


@pytest.mark.parametrize("while_it_waits", [True, False])
def test_a_shard_is_not_begun_in_a_cache_that_was_merged_meanwhile(shards, monkeypatch, while_it_waits):
    counts = iter([2, None] if while_it_waits else [None])
    monkeypatch.setattr(extraction_parts, "read_shard_count", lambda _: next(counts))
    before = sorted((shards / "shards").rglob("*"))
    with pytest.raises(InputError, match="c: the cache has no shards, expected 2; leave shard out"):
        extraction_parts.Part(shards, Shard(1, 2), range(3)).open()
    monkeypatch.undo()
    assert sorted((shards / "shards").rglob("*")) == before
    extraction_parts.Part(shards, Shard(1, 2), range(3)).open().close()  # the lock was released


def test_states_without_a_manifest_are_refused_also_in_a_dry_run(shards, root, whole):
    folder = shards / "shards" / "2-of-2"
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    message = r"2-of-2: states.lmdb without manifest.json; restore that file, or remove the folder, then .* --shard 2/2"
    for call in (
        lambda: fill(root=root, cache=shards, views=VIEWS, dry_run=True),
        lambda: fill(root=root, cache=shards, views=VIEWS, shard=Shard(2, 2)),
        lambda: Store(shards),
    ):
        with pytest.raises(InputError, match=message):
            call()
    (folder / "manifest.json").write_bytes(content)
    assert joined_entries(shards) == entries(whole)


def test_shards_that_have_lost_their_manifest_are_not_mixed_with_others(shards, root, whole):
    (shards / "manifest.json").unlink()
    message = "c: manifest.json is missing, and shards/1-of-2 is none of 3 shards; restore that file"
    with pytest.raises(InputError, match=message):
        fill(root=root, cache=shards, views=VIEWS, shard=Shard(1, 3))
    results = run_on_ranks(3, partial(messages, by_rank=[{}], root=root, cache=shards, views=VIEWS))
    assert all(re.search(message, text) for (text,) in results)
    assert sorted(path.name for path in (shards / "shards").iterdir()) == ["1-of-2", "2-of-2"]
    run_on_ranks(2, partial(messages, by_rank=[{}], root=root, cache=shards, views=VIEWS))
    assert joined_entries(shards) == entries(whole)


def test_ranks_refuse_together_what_one_of_them_refuses(root, whole, tmp_path):
    other = write_dataset(tmp_path / "other", COUNT)
    (other / "items.tsv").write_text((other / "items.tsv").read_text().replace("title of i3", "another"))
    broken = write_dataset(tmp_path / "broken", COUNT)
    lost = items_of(Shard(2, 2), root)[0]
    (broken / "images" / f"{lost}.png").unlink()
    grown = write_dataset(tmp_path / "grown", COUNT + 2)
    cache = Path(shutil.copytree(whole, tmp_path / "whole"))
    cases = {
        rf"view 'image': 1 of \d+ items cannot be read: {lost} \(no image\)": {1: {"root": broken}},
        "rank 1 on .* differs from rank 0: titles is": {1: {"root": other}},
        "rank 1 on .* differs from rank 0: batch_size is 2 there, 4 here": {1: {"batch_size": 2}},
        "shard: 2 ranks fill all shards; leave out shard 1 of 2": {1: {"shard": Shard(1, 2)}},
        "rank 1 on .* differs from rank 0: number of shards is null there, 2 here": {1: {"cache": cache}},
        "whole: the cache has no shards, and only one process can write the 4 states": dict.fromkeys(
            (0, 1), {"root": grown, "cache": cache}
        ),
        "": dict.fromkeys((0, 1), {"cache": cache}),
    }
    call = partial(messages, by_rank=list(cases.values()), root=root, cache=tmp_path / "c", views=VIEWS)
    first, second = run_on_ranks(2, call)
    assert first == second
    for expected, text in zip(cases, first[:-1]):
        assert re.search(expected, text)
    assert not (tmp_path / "c").exists()
    assert first[-1] == [Extracted(view.name, COUNT, 0, 0, 0) for view in VIEWS]  # there is nothing to write
    assert entries(cache) == entries(whole)
