"""New items from files and from tables of Python."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from iisan_fast.errors import InputError
from iisan_fast.serving.growing.new_items import open_new_items, read_item_ids, read_new_items

pl = pytest.importorskip("polars")

ROWS = [
    {"item_id": "007", "title": "A  red\tpot", "caption": None},
    {"item_id": "b", "title": "Cup &amp; plate", "caption": "a cup"},
]


def write(path, rows=ROWS):
    """Write rows in the format of the file's suffix, and return the path."""
    frame = pl.DataFrame(rows)
    match path.suffix:
        case ".csv":
            frame.write_csv(path)
        case ".parquet":
            frame.write_parquet(path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["new.csv", "new.parquet", "new.jsonl"])
def test_tables_of_all_formats_hold_ids_titles_and_captions(tmp_path, name):
    contents = read_new_items(write(tmp_path / name))
    assert contents.item_ids == ["007", "b"]
    assert contents.titles == ["A red pot", "Cup &amp; plate"]  # entities are replaced as each view has it
    assert contents.captions == [None, "a cup"]


def test_a_table_of_python_is_read_like_a_file():
    assert read_new_items(pl.DataFrame(ROWS)) == read_new_items(ROWS)
    assert read_new_items([{"item_id": 7, "title": "x"}]).item_ids == ["7"]
    assert read_new_items([{"item_id": 7, "title": "x"}]).captions == [None]


def test_lines_are_read_like_items_tsv_also_without_polars(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    file = tmp_path / "new.tsv"
    file.write_text("007\tA red pot\nb\tCup\n")
    contents = read_new_items(str(file))
    assert (contents.item_ids, contents.titles, contents.captions) == (["007", "b"], ["A red pot", "Cup"], [None] * 2)


def test_lines_may_have_a_header(tmp_path):
    file = tmp_path / "new.tsv"
    file.write_text("item_id\ttitle\tcaption\n007\tA red pot\ta pot\n")
    assert read_new_items(file)[:3] == (["007"], ["A red pot"], ["a pot"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tA\nb\n", "line 2: expected 2 fields separated by tabs, found 1"),
        ("a\tA\tx\n", "line 1: expected 2 fields separated by tabs, found 3"),
        ("a\tA\nb\tB\na\tC\n", "line 3: item 'a' stands on line 1 already"),
        ("a\t \n", "line 1: field 2 of 2 is empty"),
        ("a b\tA\n", "line 1: item id 'a b' has a space"),
        ("a\x01\tA\n", "line 1: id 'a\\\\x01' has a control character"),
        ("", "empty"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, content, message):
    file = tmp_path / "new.tsv"
    file.write_text(content)
    with pytest.raises(InputError, match=f"new.tsv.*{message}"):
        read_new_items(file)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"item_id": "a", "name": "A"}],
            "expected the columns item_id and title, found item_id, name; title is missing",
        ),
        ([{"title": "A"}], "expected the columns item_id and title, found title; item_id is missing"),
        ([{"item_id": i, "title": "A"} for i in "abcabcd"], r"found 3 that occur again \(a, b, c\); keep one"),
        (
            [{"item_id": f"{i}", "title": "" if i else "A"} for i in range(9)],
            r"expected a title for each item, found 8 without one \(1, 2, 3 and 5 more\)",
        ),
        ([{"item_id": "a", "title": None}], r"found 1 without one \(a\)"),
        ([{"item_id": "a\tb", "title": "A"}], "row 1: id 'a\\\\tb' has a control character"),
        ([{"item_id": "", "title": "A"}], "row 1: the item id is empty"),
        ([{"item_id": "a c", "title": "A"}], "row 1: item id 'a c' has a space"),
        ([{"item_id": "a", "title": 3}], "title: expected text, found 3"),
        ([], "expected the columns item_id and title, found none"),
    ],
)
def test_bad_tables_are_refused_in_one_line(rows, message):
    with pytest.raises(InputError, match=message) as error:
        read_new_items(rows)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name in ("none.tsv", "none.csv"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            read_new_items(tmp_path / name)
    (tmp_path / "new.txt").write_text("a\tA\n")
    with pytest.raises(InputError, match="new.txt: expected a file of items named"):
        read_new_items(tmp_path / "new.txt")


def test_images_are_those_of_a_folder(tmp_path):
    items = tmp_path / "new.tsv"
    items.write_text("a\tA\n")
    folder = tmp_path / "covers"
    with pytest.raises(InputError, match="covers: no such folder"), open_new_items(items, folder):
        pass
    folder.mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    with open_new_items(items, folder) as contents:
        assert contents.images.content("a") and contents.images.content("b") is None
    with open_new_items(items, None) as contents:
        assert contents.images is None


def test_ids_are_read_from_lines_and_tables(tmp_path):
    (tmp_path / "ids.txt").write_text("007\nb\n")
    assert read_item_ids(tmp_path / "ids.txt") == ["007", "b"]
    assert read_item_ids(write(tmp_path / "ids.csv")) == ["007", "b"]
    with pytest.raises(InputError, match="expected the column item_id"):
        read_item_ids(write(tmp_path / "other.csv", [{"user_id": "a"}]))
