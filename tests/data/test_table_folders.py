"""Folders of parts are one table, and the same interactions in any format give the same dataset."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import gzip
import json
import lzma
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import numpy as np
import pytest

pl = pytest.importorskip("polars")

from helpers.import_sources import HEADER, UNORDERED, USERS, refused, write
from iisan_fast.data.imports.bad_rows import BadRows, describe_bad_rows
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.opening import open_table
from iisan_fast.data.imports.options import TableOptions
from iisan_fast.errors import InputError

UNORDERED_ROWS = [line.split(",") for line in UNORDERED.splitlines()]


def read(path, columns, policy="error"):
    """Return the rows of a table as tuples, and what its bad rows are described as."""
    source = open_table(path)
    bad_rows = BadRows(path, policy, source.unit)
    rows = [row for batch in source.batches(columns, bad_rows) for row in batch.select(*columns).rows()]
    return rows, [describe_bad_rows(name, kind) for name, kind in bad_rows.kinds.items()]


def dataset(folder):
    """Return the text files of a dataset folder."""
    return [(folder / name).read_text() for name in ("users.tsv", "times.tsv", "items.tsv")]


def test_all_formats_give_the_same_dataset(tmp_path):
    generator = np.random.default_rng(1)
    frame = pl.DataFrame(
        {
            "user": generator.integers(2**53, 2**53 + 40, 500),
            "item": [f"é{number}" for number in generator.integers(0, 60, 500)],
            "timestamp": generator.integers(0, 2**40, 500),
        }
    )
    frame.write_csv(tmp_path / "in.csv")
    frame.write_ndjson(tmp_path / "in.jsonl")
    frame.write_parquet(tmp_path / "in.parquet", row_group_size=70)
    write(tmp_path / "in.json.gz", gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    write(tmp_path / "in.csv.gz", gzip.compress((tmp_path / "in.csv").read_bytes()))
    write(tmp_path / "in.jsonl.xz", lzma.compress((tmp_path / "in.jsonl").read_bytes()))
    write(tmp_path / "array.json", json.dumps(frame.to_dicts()))
    for name, suffix in (("csv", "csv"), ("ndjson", "json"), ("parquet", "parquet")):
        folder = tmp_path / f"in-{name}"
        folder.mkdir()
        for part in range(12):
            getattr(frame[part * 42 : (part + 1) * 42], f"write_{name}")(folder / f"part-{part}.{suffix}")
        write(folder / "_SUCCESS", "")
        write(folder / ".part-0.crc", b"\x01")
    import_files(tmp_path / "in.csv", tmp_path / "expected")
    expected = dataset(tmp_path / "expected")
    names = (
        "in.jsonl",
        "in.parquet",
        "in.json.gz",
        "in.csv.gz",
        "in.jsonl.xz",
        "array.json",
        "in-csv",
        "in-ndjson",
        "in-parquet",
    )
    for name in names:
        assert import_files(tmp_path / name, tmp_path / f"{name}-out").interactions == 500
        assert dataset(tmp_path / f"{name}-out") == expected, name
    parts = [tmp_path / "in-csv" / f"part-{part}.csv" for part in range(6)]
    parts += [tmp_path / "in-parquet" / f"part-{part}.parquet" for part in range(6, 12)]
    import_files(parts, tmp_path / "mixed")
    assert dataset(tmp_path / "mixed") == expected


def test_parts_are_in_natural_order_and_name_their_file(tmp_path):
    folder = tmp_path / "log"
    for part, split in ((10, "b"), (9, "b"), (2, "a")):
        place = folder / f"split={split}"
        place.mkdir(parents=True, exist_ok=True)
        pl.DataFrame({"user": [part, None], "item": ["i", "j"]}).write_parquet(place / f"part-{part}.parquet")
    (folder / "split=__HIVE_DEFAULT_PARTITION__").mkdir()
    pl.DataFrame({"user": [1], "item": ["a"]}).write_parquet(
        folder / "split=__HIVE_DEFAULT_PARTITION__" / "part-0.parquet"
    )
    rows, _ = read(folder, {"user": "user", "item": "item", "part": "split"})
    assert rows[:1] + rows[1::2] == [("1", "a", None), ("2", "i", "a"), ("9", "i", "b"), ("10", "i", "b")]
    options = TableOptions(split_column="-", timestamp_column="-")
    refused(lambda: import_files(folder, tmp_path / "out", options), tmp_path, "log/split=a/part-2.parquet row 2: user")
    counts = import_files(folder, tmp_path / "out", TableOptions(bad_rows="skip", **vars_of(options)))
    assert (counts.interactions, counts.rows) == (4, 7)
    assert [describe_bad_rows(name, kind) for name, kind in counts.bad_rows.items()] == [
        "3 bad user (split=a/part-2.parquet row 2, split=b/part-9.parquet row 2, split=b/part-10.parquet row 2)"
    ]


def vars_of(options):
    """Return the columns that options name."""
    return {"split_column": options.split_column, "timestamp_column": options.timestamp_column}


def test_folders_that_are_no_table(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "_SUCCESS", "x")
    write(folder / "empty.csv", "")
    refused(lambda: import_files(folder, tmp_path / "out"), tmp_path, "in: expected files of interactions", "none")
    write(folder / "a.csv", HEADER + UNORDERED)
    import_files(folder, tmp_path / "whole")
    assert (tmp_path / "whole" / "users.tsv").read_text() == USERS
    write(folder / "titles.csv", "item,title\na,A\n")
    refused(lambda: import_files(folder, tmp_path / "out"), tmp_path, "in/titles.csv: no column", "only item, title")
    (folder / "titles.csv").unlink()
    write(folder / "meta.jsonl", '{"item": 1}\n')
    words = ("in: expected files of one format", "delimited text: a.csv, JSON: meta.jsonl", "name the files")
    refused(lambda: import_files(folder, tmp_path / "out"), tmp_path, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"PK\x03\x04..", "zip"), (b"\x28\xb5\x2f\xfd", "Zstandard"), (b"Rar!..", "rar"), (b"Obj\x01", "Avro")],
)
def test_packed_files_say_how_to_unpack_them(tmp_path, content, words):
    source = write(tmp_path / "in.csv", content)
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "in.csv", words)


def test_the_content_decides_over_the_suffix(tmp_path):
    pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [1]}).write_parquet(tmp_path / "in.csv")
    write(tmp_path / "titles.txt", '\n{"item": "a", "title": "A"}\n')
    import_files(tmp_path / "in.csv", tmp_path / "out", TableOptions(items=tmp_path / "titles.txt"))
    assert dataset(tmp_path / "out") == ["u\ta\n", "u\t1\n", "a\tA\n"]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pl.Series([1.0, 2.0, None], dtype=pl.Float32), ["1", "2", None]),
        (pl.Series([Decimal("1.0"), Decimal("123456789012345678901"), None]), ["1", "123456789012345678901", None]),
        (pl.Series([2**64 - 1, 1, None], dtype=pl.UInt64), [str(2**64 - 1), "1", None]),
        (pl.Series([b"a", "é".encode(), b"\xff"]), ["a", "é", None]),
        (pl.Series(["b", None, "a"], dtype=pl.Enum(["a", "b"])), ["b", None, "a"]),
        (pl.Series([None, None]), [None, None]),
        (pl.Series([[1, 2], [], None]), [["1", "2"], [], None]),
        (pl.Series([["a"], ["b"]], dtype=pl.Array(pl.Categorical, 1)), [["a"], ["b"]]),
        (pl.Series([[{"id": 5}, {"id": 6}], []]).alias("id"), [["5", "6"], []]),
        (pl.Series([{"id": {"x": 5}}]).alias("id.x"), ["5"]),
    ],
)
def test_ids_of_any_type_in_parquet(tmp_path, column, texts):
    name = {"id": "item.id", "id.x": "item.id.x"}.get(column.name, "item")
    pl.DataFrame([column.alias("item")]).write_parquet(tmp_path / "in.parquet")
    assert read(tmp_path / "in.parquet", {"item": name})[0] == [(text,) for text in texts]


def test_numbers_that_are_no_ids_in_parquet(tmp_path):
    pl.DataFrame({"user": [1.0, 1.5, float("nan"), 2.0**60]}).write_parquet(tmp_path / "in.parquet")
    rows, bad = read(tmp_path / "in.parquet", {"user": "user"}, "skip")
    assert (rows, bad) == ([("1",), (None,)], ["2 bad user (rows 2, 4)"])
    for column in ([True], [[[1]]], [{"a": 1}], [[1.5]]):
        pl.DataFrame({"item": column}).write_parquet(tmp_path / "in.parquet")
        with pytest.raises(InputError, match="column 'item' holds .*; expected text or whole numbers"):
            read(tmp_path / "in.parquet", {"item": "item"})


def test_times_with_a_zone_and_sequences_in_parquet(tmp_path):
    start = datetime(2020, 1, 1, tzinfo=UTC)
    rows = [(user, item, start + timedelta(seconds=int(time))) for user, item, time in UNORDERED_ROWS]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    zoned = frame.with_columns(pl.col("timestamp").dt.convert_time_zone("Asia/Tokyo"))
    zoned.write_parquet(tmp_path / "in.parquet")
    import_files(tmp_path / "in.parquet", tmp_path / "rows")
    assert (tmp_path / "rows" / "users.tsv").read_text() == USERS
    zoned.group_by("user", maintain_order=True).agg("item", "timestamp").write_parquet(tmp_path / "lists.parquet")
    import_files(tmp_path / "lists.parquet", tmp_path / "lists")
    assert (tmp_path / "lists" / "users.tsv").read_text() == USERS
    assert (tmp_path / "lists" / "times.tsv").read_text() == (tmp_path / "rows" / "times.tsv").read_text()


def test_titles_that_are_lists_of_texts(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + UNORDERED)
    titles = pl.DataFrame({"item": ["a", "b", "c"], "title": [["A", None, "a a"], ["B"], []]})
    titles.write_parquet(tmp_path / "items.parquet")
    mixed = '{"item": "a", "title": "A a a"}\n{"item": "b", "title": ["B"]}\n{"item": "c", "title": null}\n'
    write(tmp_path / "items.json", mixed)
    for name in ("items.parquet", "items.json"):
        import_files(source, tmp_path / f"{name}-out", TableOptions(items=tmp_path / name))
        assert dataset(tmp_path / f"{name}-out")[2] == "b\tB\na\tA a a\nc\tc\n"
    with pytest.raises(InputError, match="title: expected text, found"):
        import_files(
            source,
            tmp_path / "out",
            TableOptions(items=write(tmp_path / "items.json", mixed + '{"item": "d", "title": {"x": 1}}')),
        )
