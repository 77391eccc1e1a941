"""Check extraction: new or changed content is encoded, bad content is refused first, and a kill loses nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import lmdb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.datasets import make_sequences, write_dataset_folder
from helpers.extractions import entries, interrupt, run, write_varied_items
from helpers.fake_encoders import FakeBackbone
from iisan_fast import demo, workers
from iisan_fast.config import ExtractionConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError, Stopped
from iisan_fast.states import extraction, state_writer
from iisan_fast.states.encoder_inputs import EncoderBatch, TextInputs
from iisan_fast.states.entries import entry_key
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.manifest import read_manifest, write_manifest
from iisan_fast.states.state_writer import StateWriter
from iisan_fast.states.verification import verify_cache
from iisan_fast.workers import batched, calls_ahead, worker_count

CPU = torch.device("cpu")
TITLE = ViewConfig("title", "title", "an encoder")
IMAGE = ViewConfig("image", "image", "an encoder")


@pytest.fixture
def seen(monkeypatch) -> list:
    """Return a list that collects everything that is prepared for encoding."""
    seen: list = []
    monkeypatch.setattr(
        extraction, "load_backbones", lambda views, *_, shared: [FakeBackbone(view, seen) for view in views]
    )
    return seen


@pytest.fixture
def root(tmp_path) -> Path:
    """Write a dataset of six items with one-colour images."""
    root = write_dataset_folder(tmp_path / "d", make_sequences([[1, 2, 3, 4, 5, 6]]))
    (root / "images").mkdir()
    for i in range(1, 7):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(root / "images" / f"i{i}.png")
    return root


def states(root: Path, cache: Path, view: str) -> list[float]:
    """Return the first number of each item's states."""
    item_ids = load_dataset(root).sequences.item_ids
    return load_table(cache, [view], item_ids, CPU).views[0][1:, 0, 0].tolist()


def retitle(root: Path, old: str, new: str) -> None:
    path = root / "items.tsv"
    path.write_text(path.read_text().replace(old, new))


def test_everything_is_encoded_once(root, tmp_path, seen):
    assert run(root, tmp_path / "c", IMAGE, TITLE) == [(6, 0), (6, 0)]
    assert states(root, tmp_path / "c", "image") == [4 * i for i in range(1, 7)]
    assert states(root, tmp_path / "c", "title") == [sum(f"title of i{i}".encode()) for i in range(1, 7)]
    assert run(root, tmp_path / "c", IMAGE, TITLE) == [(0, 0), (0, 0)]
    assert len(seen) == 12


def test_only_new_and_changed_items_are_encoded_again(root, tmp_path, seen):
    run(root, tmp_path / "c", IMAGE, TITLE)
    seen.clear()
    retitle(root, "title of i3", "another title")
    Image.new("RGB", (2, 2), (9, 0, 0)).save(root / "images" / "i5.png")
    Image.new("RGB", (2, 2), (7, 0, 0)).save(root / "images" / "i7.png")
    (root / "items.tsv").write_text((root / "items.tsv").read_text() + "i7\ttitle of i7\n")
    (root / "users.tsv").write_text("u0\ti1 i2 i3 i4 i5 i6 i7\n")
    assert run(root, tmp_path / "c", IMAGE, TITLE) == [(2, 0), (2, 0)]
    assert [content for content in seen if isinstance(content, str)] == ["another title", "title of i7"]
    assert states(root, tmp_path / "c", "image") == [4, 8, 12, 16, 36, 24, 28]


def test_damaged_states_are_encoded_again_and_no_others(root, tmp_path, seen):
    cache = tmp_path / "c"
    run(root, cache, IMAGE, TITLE)
    whole = entries(cache)
    flipped, shortened, swapped, taken = (entry_key("title", f"i{number}") for number in (1, 2, 3, 4))
    other_view, digest = entry_key("image", "i5"), entry_key("image", "i6")
    with lmdb.open(str(cache / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.put(flipped, whole[flipped][:30] + bytes([whole[flipped][30] ^ 1]) + whole[flipped][31:])
        transaction.put(shortened, whole[shortened][:-8])
        transaction.put(swapped, whole[entry_key("title", "i6")])
        transaction.delete(taken)
        transaction.put(other_view, whole[other_view][:-1] + b"x")
        transaction.put(digest, bytes(16) + whole[digest][16:])
    config = ExtractionConfig(dtype="float32")
    planned = extraction.extract(load_dataset(root), [IMAGE, TITLE], cache, CPU, config, dry_run=True)
    assert [result.encoded for result in planned] == [2, 4]
    seen.clear()
    assert run(root, cache, IMAGE, TITLE) == [(2, 0), (4, 0)]
    assert [content for content in seen if isinstance(content, str)] == [f"title of i{i}" for i in range(1, 5)]
    assert entries(cache) == whole and not verify_cache(cache).damage
    assert run(root, cache, IMAGE, TITLE) == [(0, 0), (0, 0)]


def test_an_old_cache_is_not_encoded_again(root, tmp_path, seen):
    cache = tmp_path / "c"
    run(root, cache, TITLE)
    manifest = read_manifest(cache)
    write_manifest(cache, {**manifest, "format": 1})
    with lmdb.open(str(cache / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in dict(transaction.cursor()).items():
            transaction.put(key, value[:-8])
    retitle(root, "title of i3", "another title")
    assert run(root, cache, TITLE) == [(1, 0)]
    assert {len(value) for value in entries(cache).values()} == {40, 48}
    assert read_manifest(cache)["format"] == 1


def test_a_view_may_be_added_later_and_a_changed_one_is_refused(root, tmp_path, seen):
    run(root, tmp_path / "c", TITLE)
    assert run(root, tmp_path / "c", IMAGE) == [(6, 0)]
    with pytest.raises(InputError, match="view 'title' was made with other settings: pooling null there, \"cls\" now"):
        run(root, tmp_path / "c", ViewConfig("title", "title", "an encoder", pooling="cls"))


def damage(root: Path) -> None:
    (root / "images" / "i2.png").unlink()
    whole = (root / "images" / "i4.png").read_bytes()
    (root / "images" / "i4.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "i5.png").write_bytes(b"no image at all")
    (root / "images" / "i6.png").write_bytes(b"")


def test_bad_images_are_named_and_counted_before_anything_is_written(root, tmp_path, seen, monkeypatch):
    damage(root)
    monkeypatch.delattr(FakeBackbone, "encode")
    with pytest.raises(InputError) as error:
        run(root, tmp_path / "c", TITLE, IMAGE)
    message = str(error.value)
    assert "4 of 6 items cannot be read" in message and "i2 (no image)" in message and "and 1 more" in message
    assert "missing_images: blank" in message and "\n" not in message
    assert not (tmp_path / "c").exists()


def test_blanks_fill_bad_images_until_they_are_mended(root, tmp_path, seen):
    whole = (root / "images" / "i4.png").read_bytes()
    damage(root)
    assert run(root, tmp_path / "c", IMAGE, missing_images="blank") == [(6, 4)]
    assert run(root, tmp_path / "c", IMAGE, missing_images="blank") == [(0, 0)]
    filled = states(root, tmp_path / "c", "image")
    assert filled[1] == filled[3] == filled[4] == filled[5] == 224 * 224 * 3 * 255
    with pytest.raises(InputError, match="4 of 6 items cannot be read"):
        run(root, tmp_path / "c", IMAGE)
    (root / "images" / "i4.png").write_bytes(whole)
    assert run(root, tmp_path / "c", IMAGE, missing_images="blank") == [(1, 0)]
    assert states(root, tmp_path / "c", "image")[3] == 16


def test_captions_that_are_missing_are_named(root, tmp_path, seen):
    caption = ViewConfig("caption", "caption", "an encoder")
    with pytest.raises(InputError, match="captions"):
        run(root, tmp_path / "c", caption)
    (root / "captions.tsv").write_text("i1\tone\ni2\ttwo\n")
    with pytest.raises(InputError, match=r"4 of 6 items cannot be read: i3 \(no text\)"):
        run(root, tmp_path / "c", caption)
    (root / "captions.tsv").write_text("".join(f"i{i}\tcaption {i}\n" for i in range(1, 7)))
    assert run(root, tmp_path / "c", caption) == [(6, 0)]


def test_states_that_overflow_the_stores_dtype_are_refused(root, tmp_path, monkeypatch, seen):
    monkeypatch.setattr(FakeBackbone, "encode", lambda self, inputs: torch.full((len(inputs["sums"]), 2, 3), 1e6))
    with pytest.raises(InputError, match="item 'i1': hidden states are not finite in torch.float16"):
        extraction.extract(load_dataset(root), [TITLE], tmp_path / "c", CPU, ExtractionConfig(dtype="float16"))


def test_other_library_versions_are_mentioned_and_borne(root, tmp_path, seen, monkeypatch, caplog):
    run(root, tmp_path / "c", TITLE)
    monkeypatch.setattr(extraction.metadata, "version", lambda name: "0.0")
    assert run(root, tmp_path / "c", TITLE) == [(0, 0)]
    assert "begun with other library versions" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_an_extraction_after_the_batch_under_way(root, tmp_path, seen, monkeypatch, number):
    encode = FakeBackbone.encode

    def signalled(self, inputs):
        signal.raise_signal(number)
        return encode(self, inputs)

    monkeypatch.setattr(FakeBackbone, "encode", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="c: 4 of 6 items of title are stored; the same command goes on") as stop:
        run(root, tmp_path / "c", TITLE)
    assert stop.value.signal_number == number and signal.getsignal(number) == before
    monkeypatch.undo()
    monkeypatch.setattr(extraction, "load_backbones", lambda views, *_, shared: [FakeBackbone(TITLE, seen)])
    assert run(root, tmp_path / "c", TITLE) == [(2, 0)]
    assert states(root, tmp_path / "c", "title") == [sum(f"title of i{i}".encode()) for i in range(1, 7)]


EXTRACTIONS = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from helpers.fake_encoders import FakeBackbone
from iisan_fast.config import ExtractionConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.states import extraction, state_writer
state_writer.GROUP_ITEMS = 8
model = object()
extraction.load_backbones = lambda views, *_, shared: [FakeBackbone(view, [], 0.02, model) for view in views]
dataset = load_dataset(Path(sys.argv[1]))
views = [ViewConfig(name, "title", "an encoder") for name in ("title", "again")]
config = ExtractionConfig(batch_size=1, dtype="float32")
for _ in sys.stdin:  # an extraction for each line, in a process that has all its imports
    child = os.fork()
    if not child:
        extraction.extract(dataset, views, Path(sys.argv[2]), FakeBackbone.device, config)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def wait_for_states(cache: Path, item_ids: list[str]) -> None:
    """Return once a running extraction has stored states. Raises TimeoutError if it stores none within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (cache / "manifest.json").exists():
            with extraction.Store(cache) as store:
                if any(digest is not None for digest in store.digests("title", item_ids)):
                    return
        time.sleep(0.02)
    raise TimeoutError(f"{cache}: no states after a minute")


@pytest.mark.slow
def test_an_extraction_killed_at_any_moment_resumes(tmp_path, seen):
    count = 120
    root = write_dataset_folder(tmp_path / "d", make_sequences([list(range(1, count + 1))], max_inputs=count))
    (root / "users.tsv").write_text(
        "".join(f"u{n}\t{' '.join(f'i{i}' for i in range(n, n + 10))}\n" for n in range(1, count, 10))
    )
    stored_counts = []
    item_ids = load_dataset(root).sequences.item_ids
    command = [sys.executable, "-c", EXTRACTIONS, str(root), str(tmp_path / "c"), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as program:
        for moment in (0.0, 0.3, 0.5, 0.7):
            program.stdin.write("again\n")
            child = int(program.stdout.readline())
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            assert program.stdout.readline() == "ended\n"
            if (tmp_path / "c" / "manifest.json").exists():
                with extraction.Store(tmp_path / "c") as store:
                    digests, again_digests = (list(store.digests(name, item_ids)) for name in ("title", "again"))
                assert digests == again_digests
                stored_counts.append(sum(digest is not None for digest in digests))
    assert stored_counts == sorted(stored_counts) and stored_counts[-1] > 0
    assert not any(count % 8 for count in stored_counts)  # a group is stored as a whole or not at all
    assert run(root, tmp_path / "c", TITLE) == [(count - stored_counts[-1], 0)]
    assert states(root, tmp_path / "c", "title") == [sum(f"title of i{i}".encode()) for i in range(1, count + 1)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[ViewConfig]:
    """Return the demo's encoders, which worker processes can load."""
    root = tmp_path_factory.mktemp("encoders")
    demo.write_image_encoder(root / "image", seed=0)
    demo.write_text_encoder(root / "text", seed=0)
    return [ViewConfig("image", "image", str(root / "image")), ViewConfig("title", "title", str(root / "text"))]


@pytest.fixture
def large(tmp_path) -> Path:
    """Write a dataset of forty items: titles of one to twenty words, images of noise, one missing and one damaged."""
    return write_varied_items(tmp_path / "large")


def test_workers_leave_the_very_same_store(large, tmp_path, encoders):
    stores = []
    for count in (0, 2):
        assert run(large, tmp_path / str(count), *encoders, missing_images="blank", workers=count) == [(40, 2), (40, 0)]
        stores.append(entries(tmp_path / str(count)))
    assert stores[0] == stores[1] and len(stores[0]) == 80


def test_what_workers_find_is_one_line(large, tmp_path, encoders):
    with pytest.raises(InputError) as error:
        run(large, tmp_path / "c", encoders[0], workers=2)
    assert re.fullmatch(
        r"view 'image': 2 of 40 items cannot be read: i1 \(no image\), i9 \(not an image of .*\); missing_images.*",
        str(error.value),
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("count", [0, 2])
def test_an_image_that_breaks_after_the_check_is_named_and_the_rest_is_kept(
    large, tmp_path, encoders, count, monkeypatch
):
    for name in ("i1", "i9"):
        Image.new("RGB", (8, 8)).save(large / "images" / f"{name}.png")
    plan = extraction.plan_extraction

    def plan_and_break(*arguments):
        todo = plan(*arguments)
        (large / "images" / "i11.png").write_bytes(b"")
        return todo

    monkeypatch.setattr(extraction, "plan_extraction", plan_and_break)
    with pytest.raises(InputError, match=r"images: item 'i11': not an image of [^\n]*$"):
        run(large, tmp_path / "c", encoders[0], workers=count)
    assert len(entries(tmp_path / "c")) == 8  # the items of two batches, from a group that was not full


def test_a_worker_that_dies_is_one_line_and_no_hang():
    with pytest.raises(InputError, match="^a worker process failed .*exited unexpectedly.*; run again with fewer"):
        list(calls_ahead(os._exit, [1, 2, 3], 1))


@pytest.mark.parametrize("count", [0, 1])
def test_what_a_call_raises_comes_out(count):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(calls_ahead(os.listdir, ["/", "nowhere"], count))


@pytest.mark.parametrize("count", [0, 1])
def test_calls_come_in_order_and_leave_the_random_state_as_it_was(count):
    random = torch.get_rng_state()
    assert list(calls_ahead(abs, [-3, 2, -1], count)) == [3, 2, 1]
    assert torch.equal(torch.get_rng_state(), random)


def test_an_interrupt_stores_what_is_encoded_and_ends_the_workers(large, tmp_path, encoders, monkeypatch):
    loads = []
    start = workers._start

    def started(loader):
        loads.append(start(loader))
        return loads[-1]

    monkeypatch.setattr(workers, "_start", started)
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(large, tmp_path / "c", encoders[0], workers=1, missing_images="blank")
    assert len(entries(tmp_path / "c")) == 12
    processes = [process for load in loads for process in load._workers]
    loads.clear()
    for process in processes:
        process.join(10)
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)


def test_workers_take_the_cpus_that_the_encoder_leaves_idle(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    many = 10**9
    cuda = torch.device("cuda")
    assert (worker_count(None, many, CPU), worker_count(None, many, cuda)) == (3, 7)
    assert worker_count(None, 2 * workers.ITEMS_A_WORKER, CPU) == 2
    assert worker_count(None, workers.ITEMS_A_WORKER - 1, cuda) == 0
    assert worker_count(9, 1, CPU) == 9 and worker_count(0, many, cuda) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert worker_count(None, many, CPU) == 0


@pytest.mark.parametrize(
    ("items", "size", "expected"), [(8, 1 << 30, 3), (7, 1 << 30, 3), (10**6, 1, 5), (10**6, 96, 5)]
)
def test_several_batches_share_a_transaction(tmp_path, seen, monkeypatch, items, size, expected):
    """Twenty items come in batches of four; the states of an item take 24 bytes."""
    root = write_dataset_folder(tmp_path / "d", make_sequences([list(range(1, 21))], max_inputs=20))
    (root / "users.tsv").write_text("".join(f"u{n}\t{' '.join(f'i{n + k}' for k in range(5))}\n" for n in range(1, 17)))
    monkeypatch.setattr(state_writer, "GROUP_ITEMS", items)
    monkeypatch.setattr(state_writer, "GROUP_BYTES", size)
    run(root, tmp_path / "c", TITLE)
    with lmdb.open(str(tmp_path / "c" / "states.lmdb"), readonly=True) as env:
        assert env.info()["last_txnid"] == expected
    assert len(entries(tmp_path / "c")) == 20


def test_finite_states_of_a_group_are_kept(root, tmp_path, seen, monkeypatch):
    encode = FakeBackbone.encode

    def one_is_not_finite(self, inputs):
        states = encode(self, inputs)
        states[inputs["sums"] == sum(b"title of i2")] = torch.nan
        return states

    monkeypatch.setattr(FakeBackbone, "encode", one_is_not_finite)
    with pytest.raises(InputError, match="item 'i2': hidden states are not finite"):
        run(root, tmp_path / "c", TITLE)
    assert len(entries(tmp_path / "c")) == 5
    monkeypatch.setattr(FakeBackbone, "encode", encode)
    assert run(root, tmp_path / "c", TITLE) == [(1, 0)]


def test_batches_of_like_lengths_give_the_states_of_single_titles(large, tmp_path, encoders):
    run(large, tmp_path / "c", encoders[1])
    dataset = load_dataset(large)
    backbone = load_backbone(encoders[1])
    stored = load_table(tmp_path / "c", ["title"], dataset.sequences.item_ids, CPU).views[0][1:]
    alone = torch.cat([backbone.encode(backbone.prepare([title])) for title in dataset.titles])
    torch.testing.assert_close(stored, alone, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 7), st.data())
def test_arranged_rows_come_once_and_by_length(lengths, size, data):
    """Rows may be arranged in one call or several; each keeps its tokens."""
    titles = [chr(65 + row) * length for row, length in enumerate(lengths)]
    contents = TextInputs(titles, FakeBackbone(TITLE, []))
    rows = data.draw(st.permutations(range(len(titles))))
    cut = data.draw(st.integers(0, len(rows)))
    for part in (rows[:cut], rows[cut:]):
        arranged = contents.arrange(part)
        assert sorted(arranged) == sorted(part)
        assert [lengths[row] for row in arranged] == sorted((lengths[row] for row in part), reverse=True)
        for batch in map(contents.batch, batched(arranged, size)):
            assert batch.inputs["sums"].tolist() == [sum(titles[row].encode()) for row in batch.rows]


def test_texts_without_tokens_are_refused_before_anything_is_written(root, tmp_path, seen, monkeypatch):
    def none(self, texts):
        raise InputError("the text 'title of i1' gives no tokens")

    monkeypatch.setattr(FakeBackbone, "tokenize", none)
    with pytest.raises(InputError, match="gives no tokens"):
        run(root, tmp_path / "c", TITLE)
    assert not (tmp_path / "c").exists()


def test_inputs_are_let_go_before_their_states_are_stored():
    """Otherwise the pixels of a thousand images would stay in memory until their transaction."""
    writer = StateWriter(None, ["image"], torch.float32, ["a", "b"])
    batch = EncoderBatch([0, 1], [b"1", b"2"], {"pixel_values": torch.zeros(2, 3)}, blank=0)
    pixels = weakref.ref(batch.inputs["pixel_values"])
    writer.add(batch, [torch.ones(2, 1, 4)])
    del batch
    assert pixels() is None and len(writer.pending) == 1


def test_images_are_listed_once_in_an_extraction(root, seen, monkeypatch):
    (root / "images" / "010").mkdir()
    (root / "images" / "i1.png").rename(root / "images" / "010" / "i1.PNG")
    listed = []
    monkeypatch.setattr(os, "scandir", lambda path, scandir=os.scandir: (listed.append(str(path)), scandir(path))[1])
    run(root, root / "cache", IMAGE, TITLE)
    images = str(root / "images")
    assert [path for path in listed if path.startswith(images)] == [images, f"{images}/010"]
