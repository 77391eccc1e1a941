"""Imports of CSV, Parquet and RecBole: unusual files are read, wrong files are refused and leave nothing behind."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pl = pytest.importorskip("polars")

from helpers.import_sources import HEADER, TIMES, UNORDERED, USERS, imported_csv, microlens, refused, table, write
from iisan_fast.cli import main
from iisan_fast.config import ProtocolConfig
from iisan_fast.data.imports.families.recbole import import_recbole
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions
from iisan_fast.data.imports.text import delimited
from iisan_fast.data.imports.writing import history_order
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError


def test_recbole(tmp_path):
    """Read fields in any order, without types, quotes unchanged, seconds with a decimal point."""
    source = tmp_path / "in"
    source.mkdir()
    rows = (line.split(",") for line in UNORDERED.splitlines())
    lines = "".join(f"{time}.0\t5\t{user}\t{item}\n" for user, item, time in rows)
    write(source / "toy.inter", "timestamp:float\trating:float\tuser_id:token\titem_id:token\r\n" + lines)
    items = 'item_id:token\tclass:token_seq\tname:token_seq\nb\tx y\t12" Blade\na\tx\t"A" pen\nc\t\t\n'
    write(source / "toy.item", items)
    options = TableOptions("id", False, "user_id", "item_id", "timestamp", "name")
    for place, out in ((source, "first"), (source / "toy.inter", "second")):
        counts = import_recbole(place, tmp_path / out, options)
        assert (counts.users, counts.items, counts.interactions, counts.items_without_title) == (2, 3, 6, 1)
        assert (tmp_path / out / "users.tsv").read_text() == USERS
        assert (tmp_path / out / "times.tsv").read_text() == TIMES
        assert table(tmp_path / out) == {"b": '12" Blade', "a": '"A" pen', "c": "c"}
    assert import_recbole(source, tmp_path / "ids").items_without_title == 3
    assert table(tmp_path / "ids") == {"b": "b", "a": "a", "c": "c"}
    options = TableOptions(title_column="title")
    words = ("toy.item", "no column 'title'", "class, name")
    refused(lambda: import_recbole(source, tmp_path / "new", options), tmp_path, *words)
    options = TableOptions(missing_titles="drop", title_column="name")  # the fields of ids as RecBole calls them
    assert import_recbole(source, tmp_path / "dropped", options).dropped_interactions == 1
    (source / "toy.item").unlink()
    assert import_recbole(source, tmp_path / "untitled").items_without_title == 3
    (source / "toy.inter").unlink()
    refused(lambda: import_recbole(source, tmp_path / "new"), tmp_path, "expected a .inter file")


def test_csv_with_columns_of_other_names_and_tables_of_titles(tmp_path):
    content = 'when,"who",note,what\n' + "".join(
        f'{time},{user},"some, ""thing""\n",{item}\n'
        for user, item, time in (line.split(",") for line in UNORDERED.splitlines())
    )
    names = {"user_column": "who", "item_column": "what", "timestamp_column": "when", "title_column": "name"}
    titles = pl.DataFrame({"what": ["a", "b", "c"], "name": ["A, a", None, "  C\tc "]})
    titles.write_csv(tmp_path / "items.csv")
    titles.write_parquet(tmp_path / "items.parquet")
    for items, data in (("items.csv", content.encode()), ("items.parquet", gzip.compress(content.encode()))):
        options = TableOptions(**names, items=tmp_path / items)
        import_files(write(tmp_path / f"in-{items}.csv", data), tmp_path / f"out-{items}", options)
        assert (tmp_path / f"out-{items}" / "users.tsv").read_text() == USERS
        assert table(tmp_path / f"out-{items}") == {"a": "A, a", "b": "b", "c": "C c"}


def test_parquet_of_any_fitting_types(tmp_path):
    rows = [line.split(",") for line in UNORDERED.splitlines()]
    users = pl.Series("user", [int(row[0][1:]) for row in rows])
    items = pl.Series("item", [row[1] for row in rows], dtype=pl.Categorical)
    times = pl.Series("timestamp", [int(row[2]) for row in rows])
    for index, column in enumerate(
        (times, times.cast(pl.Float64), times.cast(pl.Datetime("us")), times.cast(pl.UInt8))
    ):
        pl.DataFrame([users, items, column]).write_parquet(tmp_path / "in.parquet")
        import_files(tmp_path / "in.parquet", tmp_path / f"out{index}")
        assert (tmp_path / f"out{index}" / "users.tsv").read_text() == USERS.replace("u", "")
        assert (tmp_path / f"out{index}" / "times.tsv").read_text() == TIMES.replace("u", "")
    for frame, words in (
        (
            pl.DataFrame([users.cast(pl.Float32) + 0.5, items, times]),
            ["row 1: user: expected text or a whole number, found 2.5"],
        ),
        (
            pl.DataFrame([users, items, times * float("inf")]),
            ["row 1: timestamp: expected a number", "found inf"],
        ),
        (pl.DataFrame([users, items, times.replace(20, None)]), ["row 2: timestamp", "found nothing"]),
        (
            pl.DataFrame([users, items, times.alias("event_time")]),
            ["no column 'timestamp', but event_time may hold times", "--timestamp-column event_time"],
        ),
        (pl.DataFrame([users, items, times]).clear(), ["holds no interactions"]),
    ):
        frame.write_parquet(tmp_path / "in.parquet")
        refused(lambda: import_files(tmp_path / "in.parquet", tmp_path / "new"), tmp_path, "in.parquet", *words)
    write(tmp_path / "in.parquet", "no parquet")
    refused(lambda: import_files(tmp_path / "in.parquet", tmp_path / "new"), tmp_path, "cannot be read as a table")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty", "header"]),
        (HEADER, ["holds no interactions"]),
        ("user,article,timestamp\n1,2,3\n", ["no column 'item'", "user, article, timestamp", "option"]),
        (HEADER + "u,a,1\nu,b c,2\n", ["line 3: item: expected an id without spaces", "found 'b c'"]),
        (HEADER + 'u,a,1\n"u\tv",b,2\n', ["line 3: user", r"found 'u\tv'"]),
        (HEADER + 'u,"a\nb",1\n', ["line 2: item", r"found 'a\nb'"]),
        (HEADER + "u,a\0,1\n", ["line 2: item", r"found 'a\x00'"]),
        (HEADER + "u,a,1\n\nu,a,1\n", ["line 3: expected 3 fields, found an empty line"]),
        (HEADER + "u,a,1\nu,,1\n", ["line 3: item", "found nothing"]),
        (HEADER + "u,a,1\nu,a\n", ["line 3: expected 3 fields, found 2 in 'u,a'"]),
        (HEADER + "u,a,2020-02-30\n", ["line 2: timestamp", "found '2020-02-30'", "--timestamp-format"]),
        (HEADER + "u,a,1.0123456789\n", ["line 2: timestamp", "found '1.0123456789'"]),
        (HEADER + "u,a,1e30\n", ["line 2: timestamp", "found '1e30'"]),
        ((HEADER + "u,\xff,1\n").encode("latin-1"), ["line 2: not UTF-8 (byte 0xff at 3)", "--encoding"]),
        (HEADER + 'u,"a,1\n', ["line 2: a quoted field does not end in", "'u,\"a,1'"]),
    ],
)
def test_malformed_csv(tmp_path, content, words):
    source = write(tmp_path / "in.csv", content)
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "in.csv", *words)


def test_a_file_that_is_no_csv(tmp_path):
    write(tmp_path / "in.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    refused(lambda: import_files(tmp_path / "in.csv", tmp_path / "out"), tmp_path, "in.csv: no header of names")
    with pytest.raises(InputError) as error:
        import_files(tmp_path / "in.csv", tmp_path / "out")
    assert str(error.value).isprintable()


def test_a_truncated_file_is_named(tmp_path):
    whole = write(tmp_path / "whole.csv", HEADER + UNORDERED)
    part = write(tmp_path / "part.csv.gz", gzip.compress(b"item,title\n" + UNORDERED.encode())[:-9])
    words = ("part.csv.gz: cannot be read as a table", "ended before the end-of-stream")
    refused(lambda: import_files(part, tmp_path / "out"), tmp_path, *words)
    refused(lambda: import_files(whole, tmp_path / "out", TableOptions(items=part)), tmp_path, *words)


@pytest.mark.parametrize("name", ["in*", "in[1]", "in?"])
def test_names_of_files_are_no_patterns(tmp_path, name):
    for file in ("in1", "in2", name):
        rows = pl.DataFrame({"user": ["u"], "item": [file], "timestamp": [1]})
        rows.write_csv(tmp_path / f"{file}.csv")
        rows.write_parquet(tmp_path / f"{file}.parquet")
    for suffix in ("csv", "parquet"):
        assert import_files(tmp_path / f"{name}.{suffix}", tmp_path / suffix).items == 1
        assert (tmp_path / suffix / "users.tsv").read_text() == f"u\t{name}\n"


def test_files_that_are_not_there(tmp_path):
    options = TableOptions(items=tmp_path / "items.csv")
    source = write(tmp_path / "in.csv", HEADER + UNORDERED)
    refused(lambda: import_files(tmp_path / "no.csv", tmp_path / "out"), tmp_path, "no.csv: no such file")
    refused(lambda: import_files(source, tmp_path / "out", options), tmp_path, "items.csv: no such file")
    inter = write(tmp_path / "in.inter", "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n")
    refused(lambda: import_recbole(inter, tmp_path / "out", options), tmp_path, "items.csv: no such file")
    options = TableOptions(covers=tmp_path / "covers")
    refused(lambda: import_files(source, tmp_path / "out", options), tmp_path, "covers: no such folder")


def test_a_destination_must_be_new_and_in_a_folder(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + UNORDERED)
    (tmp_path / "out").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("out", "dangling", "in.csv"):
        refused(lambda name=name: import_files(source, tmp_path / name), tmp_path, name, "exists already")
    refused(lambda: import_files(source, tmp_path / "a" / "b"), tmp_path, "make", "first")


def test_mixed_spellings_of_large_timestamps_stay_exact(tmp_path):
    big = 2**62 + 1
    out = imported_csv(tmp_path, HEADER + f"u,a,{big}\nu,b,{big - 1}\nu,c,-3.0\nu,d,+12e2\n")
    assert (out / "times.tsv").read_text() == f"u\t-3 1200 {big - 1} {big}\n"
    assert (out / "users.tsv").read_text() == "u\tc d b a\n"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(-3, 3)), min_size=1, max_size=40),
    read=st.integers(1, 7),
    written=st.integers(1, 7),
)
def test_order_is_that_of_pythons_stable_sort(tmp_path_factory, rows, read, written):
    """Cut the bytes and the rows into parts of any size."""
    tmp_path = tmp_path_factory.mktemp("import")
    histories: dict[str, list[tuple[int, str]]] = {}
    for user, item, time in rows:
        histories.setdefault(f"u{user}", []).append((time, f"i{item}"))
    content = HEADER + "".join(f"u{user},i{item},{time}\n" for user, item, time in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", read)
        patch.setattr(history_order, "ROWS_AT_ONCE", written)
        out = imported_csv(tmp_path, content)
    ordered = {user: sorted(history, key=lambda pair: pair[0]) for user, history in histories.items()}
    for name, column in (("times", 0), ("users", 1)):
        expected = "".join(f"{user}\t{' '.join(str(p[column]) for p in rows)}\n" for user, rows in ordered.items())
        assert (out / f"{name}.tsv").read_text() == expected
    assert list(table(out)) == list(dict.fromkeys(f"i{item}" for _, item, _ in rows))


def test_many_equal_timestamps_stay_in_the_files_order(tmp_path):
    """Sort many rows: polars sorts few rows stably even if it is not asked to."""
    draw = random.Random(0)
    rows = [(f"u{draw.randrange(3)}", f"i{index}", draw.randrange(4)) for index in range(1000)]
    out = imported_csv(tmp_path, HEADER + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    lines = [line.split("\t") for line in (out / "users.tsv").read_text().splitlines()]
    assert [user for user, _ in lines] == list(dict.fromkeys(user for user, _, _ in rows))
    for user, items in lines:
        assert items.split() == [item for row_user, item, _ in sorted(rows, key=lambda row: row[2]) if row_user == user]


def test_many_rows_keep_the_order_of_first_appearance(tmp_path):
    """Check that the ids' codes, by which users are sorted, do not depend on the number of threads."""
    count = 600_000
    users = [f"u{index * 7919 % 100_003}" for index in range(count)]
    pl.DataFrame({"user": users, "item": [f"i{index % 5}" for index in range(count)], "timestamp": 0}).write_csv(
        tmp_path / "in.csv"
    )
    assert import_files(tmp_path / "in.csv", tmp_path / "out").users == 100_003
    with (tmp_path / "out" / "users.tsv").open() as lines:
        assert [line.split("\t")[0] for line in lines] == list(dict.fromkeys(users))


def test_an_import_loads_as_a_dataset(tmp_path):
    rows = [(user, f"i{(user + step) % 7}", 100 - step) for step in range(6) for user in range(4)]
    content = HEADER + "".join(f"u{user},{item},{time}\n" for user, item, time in rows)
    loaded = load_dataset(imported_csv(tmp_path, content), ProtocolConfig())
    assert loaded.sequences.user_ids == ["u0", "u1", "u2", "u3"]
    first = loaded.sequences.items[: loaded.sequences.offsets[1]]
    assert [loaded.sequences.item_ids[item - 1] for item in first] == ["i5", "i4", "i3", "i2", "i1", "i0"]


def run(*arguments: object) -> str:
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code
    return out.getvalue()


def test_the_command_line(tmp_path):
    source = microlens(tmp_path / "in")
    printed = run("import", "microlens", source, tmp_path / "out")
    assert "interactions" in printed and f"next: iisan-fast stats {tmp_path}/out" in printed
    write(tmp_path / "in.csv", "who,item,timestamp\nu,a,1\n")
    counts = json.loads(run("import", "csv", tmp_path / "in.csv", tmp_path / "csv", "--user-column", "who", "--json"))
    assert counts["users"] == counts["interactions"] == 1 and counts["items_without_cover"] is None
    pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [1]}).write_parquet(tmp_path / "in.parquet")
    write(tmp_path / "a.jpg", b"\xff\xd8")
    run("import", "parquet", tmp_path / "in.parquet", tmp_path / "parquet", "--covers", tmp_path, "--copy-covers")
    write(tmp_path / "in.inter", "user_id:token\titem_id:token\ttime:float\nu\ta\t1\n")
    run("import", "recbole", tmp_path / "in.inter", tmp_path / "recbole", "--timestamp-field", "time")
    for folder in ("csv", "parquet", "recbole"):
        assert (tmp_path / folder / "users.tsv").read_text() == "u\ta\n"


def test_the_command_line_counts_rows_that_are_left_out(tmp_path):
    source = write(tmp_path / "in.csv", 'u,5.0,a,1\nu,5.0,b"c,2\nu,5.0,d\nu,5.0,"e,3\n')
    options = ("--columns", "user,-,item,timestamp", "--bad-rows", "skip")
    counts = json.loads(run("import", "csv", source, tmp_path / "json", *options, "--json"))
    assert (counts["rows"], counts["interactions"]) == (4, 1)
    assert counts["bad_rows"] == {
        "stray quote": {"unit": "line", "count": 2, "places": [2, 4], "files": []},
        "wrong number of fields": {"unit": "line", "count": 1, "places": [3], "files": []},
    }
    printed = run("import", "csv", source, tmp_path / "table", *options)
    assert "2 stray quote (lines 2, 4)" in printed and "1 wrong number of fields (line 3)" in printed


def test_without_polars_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("iisan_fast.data.imports.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(SystemExit) as end:
        main(["import", "csv", str(tmp_path), str(tmp_path / "out")])
    assert end.value.code == 2 and "pip install 'iisan-fast[import]'" in capsys.readouterr().err


ENDLESS = """
import sys, time
from iisan_fast.cli import main
from iisan_fast.data.imports import flat

def endless(*_):
    print("writing", flush=True)
    time.sleep(60)

flat.write_dataset = endless
main(["import", "csv", *sys.argv[1:]])
"""


def test_an_import_that_is_terminated_leaves_nothing(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + UNORDERED)
    command = [sys.executable, "-c", ENDLESS, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(os.listdir(tmp_path)) == 2
        process.terminate()
    assert process.returncode == 143
    assert os.listdir(tmp_path) == ["in.csv"]
