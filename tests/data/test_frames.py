"""Tables from Python and from files: one frame from every kind of table, ids as text, one line for every mistake."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import decimal
import json
import sys

import pytest

pl = pytest.importorskip("polars")

from iisan_fast.data.frames import as_polars
from iisan_fast.data.table_files import read_table_file
from iisan_fast.errors import InputError

COLUMNS = {"item_id": ["007", "b"], "title": ["One", None], "price": [1.5, 2.0]}
RECORDS = [dict(zip(COLUMNS, row)) for row in zip(*COLUMNS.values())]
EXPECTED = pl.DataFrame(COLUMNS)


class Capsule:
    """An arrow stream without any of the libraries' classes."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class Interchange:
    """A frame of the interchange protocol alone."""

    def __init__(self, table):
        self.table = table

    def __dataframe__(self, nan_as_null=False, allow_copy=True):
        return self.table.__dataframe__(nan_as_null, allow_copy)


def refused(action, *words: str) -> None:
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("kind", ["polars", "lazy", "pandas", "arrow", "capsule", "interchange", "records"])
def test_every_kind_of_table_gives_the_same_frame(kind):
    if kind in ("pandas", "arrow", "capsule", "interchange"):
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table(COLUMNS)
    if kind == "pandas":
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(COLUMNS, index=["x", "y"])
    else:
        frames = {"polars": lambda: EXPECTED, "lazy": EXPECTED.lazy, "records": lambda: RECORDS}
        frames |= {"arrow": lambda: table, "capsule": lambda: Capsule(table)}
        frame = frames.get(kind, lambda: Interchange(table))()
    assert as_polars(frame, "items").equals(EXPECTED)


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (pl.Series([1, 20], dtype=pl.UInt8), ["1", "20"]),
        (pl.Series([2**64 - 1], dtype=pl.UInt64), ["18446744073709551615"]),
        (pl.Series([1.0, -3.0]), ["1", "-3"]),
        (pl.Series([decimal.Decimal("12.00")]), ["12"]),
        (pl.Series(["x", "007"], dtype=pl.Categorical), ["x", "007"]),
    ],
)
def test_ids_become_their_decimal_text(ids, texts):
    for name in ("item_id", "user_id"):
        assert as_polars(pl.DataFrame({name: ids}), "items")[name].to_list() == texts
        assert as_polars([{name: value} for value in ids], "items")[name].to_list() == texts


def test_histories_become_lists_of_text():
    lists = [[1, 20], [], None, [3]]
    expected = [["1", "20"], [], None, ["3"]]
    assert as_polars(pl.DataFrame({"history": lists}), "users")["history"].to_list() == expected
    assert as_polars([{"history": value} for value in lists], "users")["history"].to_list() == expected
    pairs = pl.DataFrame({"history": pl.Series([[1.0, 2.0]], dtype=pl.Array(pl.Float64, 2))})
    assert as_polars(pairs, "users")["history"].to_list() == [["1", "2"]]
    joined = [{"history": "1 20"}, {"history": ["007", 7]}]
    refused(lambda: as_polars(joined, "users"), "users: history")
    refused(lambda: as_polars(pl.DataFrame({"history": [[1.0], [2.0, 2.5]]}), "users"), "users row 2: history", "2.5")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1.0, 2.5], ["items row 2: item_id: expected text or a whole number, found 2.5"]),
        ([1.0, float("nan")], ["items row 2", "found nan"]),
        ([2.0**60], ["items row 1", "found 1.152921504606847e+18"]),
        (["a", None], ["items row 2", "found nothing"]),
        ([True], ["items row 1", "found True"]),
        ([decimal.Decimal("1.5")], ["items row 1", "found Decimal('1.5')"]),
        ([None], ["items row 1", "found nothing"]),
        ([b"a"], ["items row 1", "found b'a'"]),
    ],
)
def test_an_unfit_id_is_an_error_that_names_its_row(ids, words):
    refused(lambda: as_polars(pl.DataFrame({"item_id": ids}), "items"), *words)
    refused(lambda: as_polars([{"item_id": value} for value in ids], "items"), *words)


def test_what_is_no_table_is_refused():
    expected = "items: expected a frame of pandas, polars or pyarrow, or a list of dicts"
    refused(lambda: as_polars("items.csv", "items"), expected, "found str")
    refused(lambda: as_polars({"item_id": ["a"]}, "items"), expected, "found dict")
    refused(lambda: as_polars([{"item_id": "a"}, "b"], "items"), "items row 2: expected a dict", "found str")
    refused(lambda: as_polars([{1: "a"}], "items"), "items row 1: expected text as column names, found 1")
    refused(lambda: as_polars([{"title": object()}], "items"), "items: title", "found object")
    refused(lambda: as_polars([{"title": [1, "a"]}], "items"), "items: title: its values are no column")


def test_columns_that_cannot_be_used_are_named():
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"title": ["A", "B"], "item_id": ["a", 7]}, dtype=object)
    refused(lambda: as_polars(frame, "items"), "items: item_id: its values are no column", "give them one type")
    twice = pandas.DataFrame([["a", "b", "A"]], columns=["item_id", "item_id", "title"])
    for table in (twice, pyarrow.table([["a"], ["b"]], names=["item_id", "item_id"])):
        refused(lambda table=table: as_polars(table, "items"), "items: two columns are named 'item_id'", "another name")
    refused(lambda: as_polars(pandas.Series(["a"]), "items"), "items: expected a frame", "found Series")


def test_without_polars_the_error_says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("iisan_fast.data.imports.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "polars", None)
    refused(lambda: as_polars([{"item_id": "a"}], "items"), "pip install 'iisan-fast[import]'")


def test_every_format_of_file_gives_the_same_ids_and_texts(tmp_path):
    (tmp_path / "items.csv").write_bytes(b'\xef\xbb\xbfitem_id,title,place\r\n007,"A, ""b""",x\r\n7,,y\r\n')
    (tmp_path / "items.tsv").write_text('item_id\ttitle\tplace\n007\tA, "b"\tx\n7\t\ty\n')
    rows = [
        {"item_id": "007", "title": 'A, "b"', "place": "x"},
        {"item_id": 7, "place": "y"},
    ]
    (tmp_path / "items.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    expected = pl.DataFrame({"item_id": ["007", "7"], "title": ['A, "b"', None], "place": ["x", "y"]})
    expected.write_parquet(tmp_path / "items.parquet")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        assert read_table_file(tmp_path / f"items.{suffix}", "items").equals(expected), suffix
    pl.DataFrame({"user_id": [5], "history": [[1, 2]]}).write_parquet(tmp_path / "users.parquet")
    assert read_table_file(tmp_path / "users.parquet", "users").rows() == [("5", ["1", "2"])]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", ["empty; expected a header"]),
        ("a.csv", b"item_id,title\n", ["holds no items; expected a row or more"]),
        ("a.csv", b"item_id,title\n1,a\n2\n", ["line 3: expected 2 fields, found 1", "correct it"]),
        ("a.csv", b"item_id,title\n1,\xff\n", ["line 2: not UTF-8"]),
        ("a.csv", b"item_id,title\n1,a\n,b\n", ["line 3: item_id: expected text", "found nothing"]),
        ("a.csv", b"item_id,title,title\n1,a,b\n", ["line 1: two columns are named 'title'"]),
        ("a.csv", b"1,One\n2,Two\n", ["line 1: expected a header that names user_id or item_id", "'1', 'One'"]),
        ("a.tsv", b"item_id;title\n1;a\n", ["line 1: expected tabs between fields, found semicolons"]),
        ("a.tsv", b"item_id\ttitle\n1\ta\tb\n", ["line 2: expected 2 fields, found 3"]),
        ("a.parquet", b"no parquet", ["cannot be read as a table"]),
        ("a.jsonl", b"", ["holds no items"]),
        ("a.jsonl", b'{"item_id": 1}\n[2]\n', ["line 2: expected a JSON object", "found '[2]'"]),
        ("a.jsonl", b'{"item_id": 1}\n{"item_id"\n', ["line 2: expected a JSON object, found '{\"item_id\"'"]),
        ("a.jsonl", b'{"item_id": 1}\n\n{"item_id": 1.5}\n', ["line 3: item_id: expected text", "found 1.5"]),
        ("a.jsonl", b'{"item_id": "1"}\n{"title": "a"}\n', ["line 2: item_id", "found nothing"]),
        ("a.jsonl", b'{"item_id": "1", "item_id": "2"}\n', ["line 1: expected", '"item_id" stands twice in an object']),
        ("a.jsonl", b'{"item_id": "\xff"}\n', ["line 1: not UTF-8"]),
        ("a.jsonl", b'{"item_id": "\\ud800"}\n', ["line 1: half a surrogate pair"]),
        ("a.jsonl", b"[" * 200_000, ["line 1: expected a JSON object, found '[[["]),
        ("a.xlsx", b"x", ["expected a file of items named *.csv, *.tsv, *.parquet, *.jsonl, found .xlsx"]),
    ],
)
def test_an_unfit_file_is_an_error_with_file_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_table_file(tmp_path / name, "items"), str(tmp_path / name), *words)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(lambda: read_table_file(tmp_path / "a.csv", "items"), "a.csv: no such file of items")
    (tmp_path / "b.csv").mkdir()
    refused(lambda: read_table_file(tmp_path / "b.csv", "items"), "expected a regular file, found a folder")
