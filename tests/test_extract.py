"""Extraction: what is new or changed is encoded, bad content refused before anything is written, kills do no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_sequences, write_dataset_folder
from PIL import Image

from iisan_fast import extract as extraction
from iisan_fast.config import ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.hidden_states import load_table
from iisan_fast.sequences import load_dataset

CPU = torch.device("cpu")
TITLE = ViewConfig("title", "title", "an encoder")
IMAGE = ViewConfig("image", "image", "an encoder")


class FakeBackbone:
    """Stands in for an encoder: a state is a few numbers that depend on the content alone."""

    def __init__(self, view: ViewConfig, seen: list, delay: float = 0) -> None:
        self.view, self.seen, self.delay = view, seen, delay

    def describe(self) -> dict:
        return {"encoder": self.view.encoder, "layers": [0, 1], "width": 3, "pooling": self.view.pooling}

    def prepare(self, contents) -> list:
        self.seen.extend(contents)
        return [
            sum(content.tobytes() if isinstance(content, Image.Image) else content.encode()) for content in contents
        ]

    def encode(self, sums: list) -> torch.Tensor:
        time.sleep(self.delay)
        return torch.tensor(sums, dtype=torch.float64)[:, None, None] + torch.arange(6).view(1, 2, 3)


@pytest.fixture
def seen(monkeypatch) -> list:
    """Everything that was encoded."""
    seen: list = []
    monkeypatch.setattr(extraction, "load_backbone", lambda view, device: FakeBackbone(view, seen))
    return seen


@pytest.fixture
def root(tmp_path) -> Path:
    """A dataset of six items with one-colour images."""
    root = write_dataset_folder(tmp_path / "d", make_sequences([[1, 2, 3, 4, 5, 6]]))
    (root / "images").mkdir()
    for i in range(1, 7):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(root / "images" / f"i{i}.png")
    return root


def run(root: Path, cache: Path, *views: ViewConfig, **options) -> list[tuple[int, int]]:
    """(encoded, blank) of each view."""
    results = extraction.extract(load_dataset(root), list(views), cache, CPU, batch_size=4, dtype="float32", **options)
    return [(result.encoded, result.blank) for result in results]


def states(root: Path, cache: Path, view: str) -> list[float]:
    """The first number of each item's states."""
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


def test_a_view_may_be_added_later_and_a_changed_one_is_refused(root, tmp_path, seen):
    run(root, tmp_path / "c", TITLE)
    assert run(root, tmp_path / "c", IMAGE) == [(6, 0)]
    with pytest.raises(InputError, match="view 'title' was made otherwise: pooling null there, \"cls\" now"):
        run(root, tmp_path / "c", ViewConfig("title", "title", "an encoder", pooling="cls"))


def damage(root: Path) -> None:
    (root / "images" / "i2.png").unlink()
    whole = (root / "images" / "i4.png").read_bytes()
    (root / "images" / "i4.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "i5.png").write_bytes(b"no image at all")
    (root / "images" / "i6.png").write_bytes(b"")


def test_bad_images_are_named_and_counted_before_anything_is_written(root, tmp_path, seen):
    damage(root)
    with pytest.raises(InputError) as error:
        run(root, tmp_path / "c", TITLE, IMAGE)
    message = str(error.value)
    assert "4 of 6 items cannot be read" in message and "i2 (no image)" in message and "and 1 more" in message
    assert "--missing-images blank" in message and "\n" not in message
    assert not (tmp_path / "c").exists() and not seen


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
    monkeypatch.setattr(FakeBackbone, "encode", lambda self, sums: torch.full((len(sums), 2, 3), 1e6))
    with pytest.raises(InputError, match="item 'i1': hidden states are not finite in torch.float16"):
        extraction.extract(load_dataset(root), [TITLE], tmp_path / "c", CPU, dtype="float16")


def test_other_library_versions_are_mentioned_and_borne(root, tmp_path, seen, monkeypatch, caplog):
    run(root, tmp_path / "c", TITLE)
    monkeypatch.setattr(extraction.metadata, "version", lambda name: "0.0")
    assert run(root, tmp_path / "c", TITLE) == [(0, 0)]
    assert "begun with other versions" in caplog.text


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_extract as t
t.extraction.load_backbone = lambda view, device: t.FakeBackbone(view, [], delay=0.02)
print("ready", flush=True)
dataset = t.load_dataset(Path(sys.argv[1]))
t.extraction.extract(dataset, [t.TITLE], Path(sys.argv[2]), t.CPU, batch_size=1, dtype="float32")
"""


def test_an_extraction_killed_at_any_moment_resumes(tmp_path, seen):
    count = 120
    root = write_dataset_folder(tmp_path / "d", make_sequences([list(range(1, count + 1))], max_inputs=count))
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "c"), str(Path(__file__).parent)]
    (root / "users.tsv").write_text(
        "".join(f"u{n}\t{' '.join(f'i{i}' for i in range(n, n + 10))}\n" for n in range(1, count, 10))
    )
    kept = []
    for moment in (0.0, 0.3, 0.5, 0.7):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(moment)
            os.kill(process.pid, signal.SIGKILL)
        if (tmp_path / "c" / "manifest.json").exists():
            with extraction.Store(tmp_path / "c") as store:
                digests = list(store.digests("title", load_dataset(root).sequences.item_ids))
            kept.append(sum(digest is not None for digest in digests))
    assert kept == sorted(kept) and kept[-1] > 0
    assert run(root, tmp_path / "c", TITLE) == [(count - kept[-1], 0)]
    assert states(root, tmp_path / "c", "title") == [sum(f"title of i{i}".encode()) for i in range(1, count + 1)]
