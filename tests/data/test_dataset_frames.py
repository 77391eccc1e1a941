"""Datasets from frames: equal frames of every library give one folder, and mistakes are named before it is written."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import datetime

import pytest

pl = pytest.importorskip("polars")

from helpers.import_sources import UNORDERED, refused, table
from iisan_fast import Dataset
from iisan_fast.data.imports.writing import dataset_frames
from iisan_fast.errors import InputError

ROWS = [line.split(",") for line in UNORDERED.splitlines()] + [["u1", "a", "30"], ["u2", "c", "40"], ["u2", "c", "40"]]
INTERACTIONS = {
    "user_id": [row[0] for row in ROWS],
    "item_id": [row[1] for row in ROWS],
    "timestamp": [int(row[2]) for row in ROWS],
}
ITEMS = {"item_id": ["a", "b", "c", "d"], "title": [" A\ta ", "B &amp; b", "C", "never seen"]}
USERS = "u2\ta a b c c\nu1\tc a b a\n"  # equal times keep their order
CACHE_NAME = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Put the user's cache folder into the test's."""
    monkeypatch.setattr(dataset_frames, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "datasets"


def records(columns: dict) -> list[dict]:
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def made(interactions=None, items=None, **options) -> Dataset:
    chosen = {"min_interactions": 4} | options
    return Dataset.from_frames(interactions or records(INTERACTIONS), items or records(ITEMS), **chosen)


def test_frames_of_every_library_give_one_dataset(cache):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    for make in (records, pl.DataFrame, pandas.DataFrame, pyarrow.table):
        dataset = Dataset.from_frames(make(INTERACTIONS), make(ITEMS), min_interactions=4)
        assert dataset.sequences.user_ids == ["u2", "u1"]
        assert dataset.sequences.item_ids == ["b", "a", "c"]  # by first appearance
        assert dataset.titles == ["B & b", "A a", "C"] and dataset.captions == [None] * 3
        assert dataset.protocol.min_interactions == 4
    (folder,) = cache.iterdir()
    assert dataset.root == folder and len(folder.name) == CACHE_NAME
    assert (folder / "users.tsv").read_text() == USERS
    assert (folder / "times.tsv").read_text() == "u2\t10 10 30 40 40\nu1\t10 20 20 30\n"
    assert not (folder / "captions.tsv").exists()


def test_equal_frames_are_not_written_again_and_others_get_another_folder(cache):
    root = made().root
    (root / "mark").touch()
    assert made().root == root and (root / "mark").exists()
    others = [
        made(records(INTERACTIONS | {"timestamp": [0] * len(ROWS)})),
        made(records({name: INTERACTIONS[name] for name in ("user_id", "item_id")})),
        made(items=records(ITEMS | {"title": ["A", "B", "C", "D"]})),
        made(items=records(ITEMS | {"caption": ["one", None, "", None]})),
    ]
    assert len({root, *(other.root for other in others)}) == 5
    assert {*cache.iterdir()} == {root, *(other.root for other in others)}


def test_without_timestamps_the_order_of_the_frame_stays(cache):
    interactions = records({name: INTERACTIONS[name] for name in ("user_id", "item_id")})
    root = made(interactions).root
    assert (root / "users.tsv").read_text() == "u2\tb a a c c\nu1\ta c b a\n" and not (root / "times.tsv").exists()


def test_ids_as_numbers_and_points_in_time():
    start = datetime.datetime(2020, 1, 1)
    times = [start + datetime.timedelta(days=value) for value in INTERACTIONS["timestamp"]]
    numbers = {"a": 1, "b": 2, "c": 3}
    ids = {"item_id": [numbers[item] for item in INTERACTIONS["item_id"]], "timestamp": times}
    catalogue = ITEMS | {"item_id": [1.0, 2.0, 3.0, 4.0]}
    for unit in ("ms", "us", "ns"):
        frame = pl.DataFrame(INTERACTIONS | ids).with_columns(pl.col("timestamp").cast(pl.Datetime(unit)))
        dataset = Dataset.from_frames(frame, pl.DataFrame(catalogue), min_interactions=4)
        assert dataset.sequences.item_ids == ["2", "1", "3"]
        line = (dataset.root / "times.tsv").read_text().splitlines()[0]
        assert int(line.split()[1]) == (start + datetime.timedelta(days=10) - datetime.datetime(1970, 1, 1)) // (
            datetime.timedelta(microseconds=1)
        )


def test_fractions_and_dates_as_text():
    start = datetime.datetime(2020, 1, 1)
    dates = [(start + datetime.timedelta(seconds=value)).isoformat() for value in INTERACTIONS["timestamp"]]
    fractions = [value / 8 for value in INTERACTIONS["timestamp"]]
    first = (start - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1)
    for times, offset, unit in ((dates, first, 10**6), (fractions, 0, 125_000)):
        root = made(records(INTERACTIONS | {"timestamp": times})).root
        assert (root / "users.tsv").read_text() == USERS
        line = " ".join(str(offset + value * unit) for value in (10, 10, 30, 40, 40))
        assert (root / "times.tsv").read_text().splitlines()[0] == f"u2\t{line}"


def test_captions_come_from_their_column_or_from_another_frame():
    captions = {"item_id": ["a", "c", "d"], "caption": ["One\nline", " ", "four"]}
    in_items = made(items=records(ITEMS | {"caption": ["One line", None, None, "four"]}))
    apart = made(captions=pl.DataFrame(captions))
    assert in_items.captions == apart.captions == [None, "One line", None] and in_items.root == apart.root


def test_images_are_linked(tmp_path, caplog):
    (tmp_path / "covers").mkdir()
    (tmp_path / "covers" / "a.jpg").touch()
    root = made(images=tmp_path / "covers").root
    assert (root / "images").is_symlink() and (root / "images").resolve() == tmp_path / "covers"
    assert "no cover for 2 of 3 items (b, c)" in caplog.text
    (tmp_path / "covers.lmdb").mkdir()
    (tmp_path / "covers.lmdb" / "data.mdb").touch()
    root = made(images=tmp_path / "covers.lmdb").root
    assert (root / "images.lmdb").resolve() == tmp_path / "covers.lmdb" and not (root / "images").exists()


def test_the_folder_may_be_chosen_and_must_be_new(tmp_path, cache):
    root = made(folder=tmp_path / "mine").root
    assert root == tmp_path / "mine" and table(root) == {"b": "B &amp; b", "a": "A a", "c": "C"}
    assert not cache.exists()
    refused(lambda: made(folder=tmp_path / "mine"), tmp_path, "mine: exists already")


@pytest.mark.parametrize(
    ("interactions", "items", "options", "words"),
    [
        ({"user_id": ["u"]}, {}, {}, ["interactions: expected the columns user_id, item_id, found user_id"]),
        ({}, {"item_id": ["a"]}, {}, ["items: expected the columns item_id, title, found item_id"]),
        (
            {"item_id": ["x", "y", "x", "z", "w", "a", "a", "a", "a"]},
            {},
            {},
            ["4 of 5 items are not in items (x, y, z"],
        ),
        ({"item_id": ["a b"] * 9}, {}, {}, ["interactions row 1: item: expected an id without spaces"]),
        ({"user_id": ["u\t"] * 9}, {}, {}, ["interactions row 1: user: expected an id without spaces"]),
        ({"timestamp": ["x"] * 9}, {}, {}, ["interactions row 1: timestamp: expected a number", "found 'x'"]),
        ({"timestamp": [None] * 9}, {}, {}, ["interactions row 1: timestamp", "found nothing"]),
        ({"timestamp": [datetime.timedelta(1)] * 9}, {}, {}, ["timestamp: expected numbers or points in time"]),
        ({}, {"item_id": ["a", "b", "a", "b"]}, {}, ["items: expected each item_id once, found several rows of a, b"]),
        ({}, {"item_id": ["a", "b", "c", "d\t"]}, {}, ["items row 4: item: expected an id without spaces"]),
        ({}, {"title": ["A", " ", None, "D"]}, {}, ["items: no title for 2 of 4 items (b, c); give each a title"]),
        ({}, {"title": [["A"]] * 4}, {}, ["items: title: expected text, found List"]),
        ({}, {}, {"captions": [{"item_id": "q", "caption": "Q"}]}, ["captions: 1 of its items are not in items (q)"]),
        ({}, {"caption": ["A"] * 4}, {"captions": [{}]}, ["captions: items has a column caption already"]),
        ({}, {}, {"images": "nowhere"}, ["nowhere: no such folder"]),
        ({}, {}, {"images": 3}, ["images: expected a path, found 3"]),
        ({}, {}, {"folder": 3}, ["folder: expected a path, found 3"]),
        ({}, {}, {"images": "nowhere.lmdb"}, ["nowhere.lmdb: no such database of images"]),
        ({}, {}, {"max_input": 3}, ["max_input"]),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, cache, interactions, items, options, words):
    chosen = interactions if len(interactions.get("user_id", ROWS)) < len(ROWS) else INTERACTIONS | interactions
    catalogue = items if items == {"item_id": ["a"]} else ITEMS | items
    with pytest.raises(InputError) as error:
        Dataset.from_frames(records(chosen), records(catalogue), **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not cache.exists() or not [*cache.iterdir()]
