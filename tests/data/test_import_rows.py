"""Rows of imported text: none is lost, shifted or swallowed, and those that do not fit are refused or counted."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import csv
import gzip
import io
import logging
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pl = pytest.importorskip("polars")

from helpers.import_sources import HEADER, imported_csv, microlens, refused, table, write
from iisan_fast.data.imports.bad_rows import BadRows
from iisan_fast.data.imports.families.microlens import import_microlens
from iisan_fast.data.imports.families.recbole import import_recbole
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import ImportOptions, TableOptions
from iisan_fast.data.imports.text import delimited
from iisan_fast.data.imports.text.delimited import DelimitedText
from iisan_fast.errors import InputError

NAMED = "user,item,timestamp,name\n"


def history(folder) -> str:
    return (folder / "users.tsv").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            NAMED + 'u,a,1,Saw\nu,b,2,7" tablet\nu,c,3,x\nu,d,4,9" tablet\n',
            ["line 3: a quote inside a field", '7" tab'],
        ),
        (NAMED + 'u,a,1,"Saw" and\n', ["line 2: text after the closing quote"]),
        (NAMED + 'u,a,1,"Saw\nu,b,2,x\nu,c,3,9" tablet\n', ["line 2: text after the closing quote"]),
        (
            NAMED + 'u,a,1,"Saw\nu,b,2,x\nu,c,3,tablet 9"\n',
            ["line 2: a quoted field goes on to line 3, which is a row"],
        ),
        (
            NAMED + 'u,a,1,"Drill, big\nu,b,2e0,x\nu,c,3,tablet 9"\n',
            ["line 2: a quoted field goes on to line 3, which is a row"],
        ),
        (
            'name,user,item,timestamp\n"Drill, big,u,a,1\nx,u,b,2\n9",u,c,3\n',
            ["line 2: a quoted field goes on to line 3, which is a row"],
        ),
        (NAMED + 'u,a,1,x\nu,b,2,"Saw\nu,b,3,x\n', ["line 3: a quoted field does not end"]),
        ("user,item,price,timestamp\nu,a,10,1\nu,e,1,299,2\n", ["line 3: expected 4 fields, found 5 in 'u,e,1,299,2'"]),
        (HEADER + "u,a,1\nu,b\x1b[2J\n", ["line 3: expected 3 fields, found 2", r"'u,b\x1b[2J'"]),
        (HEADER + 'u,a,1\n"u,\nx",b,1,2\n', ["line 3: expected 3 fields, found 4"]),
        (HEADER + "u,a,1\n\nu,a,1\n", ["line 3: expected 3 fields, found an empty line"]),
        (HEADER + "u,a\rb,1\n", ["line 2: a carriage return inside a field"]),
        (HEADER + f"u,{'a' * 5000},1\n", ["line 2: item: expected an id of at most 4,096 bytes, found 5,000"]),
        (HEADER + "u,\x1b[2Ja,1\n", ["line 2: item", r"'\x1b[2Ja'"]),
        (HEADER + "u,a\x85,1\n", ["line 2: item", r"'a\x85'"]),
        (HEADER + "u,a,1\n\ufeffu,b,2\n", ["line 3: user", r"'\ufeffu'"]),
        ("u\ta\t1\n", ["line 1: '1' looks like data", "--columns"]),
        ("\n" + HEADER + "u,a,1\n", ["the first line is empty"]),
        (HEADER + "u,a,nan\n", ["line 2: timestamp"]),
        (HEADER + "u,a,inf\n", ["line 2: timestamp"]),
        (HEADER + f"u,a,{2**53}.5\n", ["line 2: timestamp"]),
        (HEADER + "u,a,1600000000.0000000001\n", ["line 2: timestamp"]),
        (HEADER + f"u,a,1\nu,a,{2**53}.5e0\n", ["line 3: timestamp"]),
        (HEADER + "u,a,1e\n", ["line 2: timestamp"]),
        (HEADER + f"u,a,{2**63}.0\n", ["line 2: timestamp"]),
        ((HEADER + "u,a,1\n").encode("utf-16-le"), ["line 1: looks like UTF-16", "--encoding utf-16-le"]),
        ("user,item,timestamp,item\nu,a,1,b\n", ["line 1: two columns are named 'item'"]),
        ('user,it"em,timestamp\nu,a,1\n', ["line 1: a quote inside a field"]),
    ],
)
@pytest.mark.parametrize("block_bytes", [7, 1 << 20])
def test_a_row_that_does_not_fit_is_refused_with_its_line(tmp_path, monkeypatch, content, words, block_bytes):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    source = write(tmp_path / "in.csv", content)
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "in.csv", *words)
    source = write(tmp_path / "in.csv", gzip.compress(content if isinstance(content, bytes) else content.encode()))
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "in.csv", *words)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
def test_legal_forms_are_read(tmp_path, monkeypatch, end, tail, block_bytes):
    """Read quoted separators, quotes and line ends, a byte order mark, and blank lines at the end."""
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    rows = [
        "user,text,item,timestamp",
        'u,"a ""b"", c",x,1',
        '"u","", y",2',
        'v,"new\n""line"", \r\nu,v",z,3',
        'u,,"y,",4',
    ]
    rows[2] = '"u","","y",2'
    out = imported_csv(tmp_path, b"\xef\xbb\xbf" + (end.join(rows) + tail).encode())
    assert history(out) == "u\tx y y,\nv\tz\n"


@pytest.mark.parametrize("block_bytes", [3, 17, 1 << 20])
def test_bad_rows_are_left_out_counted_and_shown(tmp_path, monkeypatch, caplog, block_bytes):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    lines = (
        *("user,item,timestamp,name", "u,a,1,x", 'u,b,2,7" tablet', "u,c,3,x", "u,d,x,x", "u,,5,x", "u,f,6", ""),
        *('u,g,7,"open', "u,h,8,x", 'v,i,9,"more"', "u,j k,10,x", "u,l,11,x,y", "u\x1b,m,12,x", "u,n\r,13,x"),
    )
    source = write(tmp_path / "in.csv", "\n".join(lines) + "\n")
    source.write_bytes(source.read_bytes() + b"u,o,14,\xff\nu,p,15,x\n")
    counts = import_files(source, tmp_path / "out", TableOptions(bad_rows="skip"))
    assert history(tmp_path / "out") == "u\ta c h p\nv\ti\n"
    assert (counts.interactions, counts.rows) == (5, 16)
    assert {kind: (rows.count, rows.places) for kind, rows in counts.bad_rows.items()} == {
        "stray quote": (2, [3, 9]),
        "bad timestamp": (1, [5]),
        "bad item": (2, [6, 12]),
        "wrong number of fields": (2, [7, 13]),
        "empty line": (1, [8]),
        "bad user": (1, [14]),
        "carriage return": (1, [15]),
        "not UTF-8": (1, [16]),
    }
    assert "left out 11 of 16 rows" in caplog.text and "2 stray quote (lines 3, 9)" in caplog.text
    source.write_text(HEADER + "u,a\nu,,1\n")
    options = TableOptions(bad_rows="skip")
    refused(
        lambda: import_files(source, tmp_path / "new", options), tmp_path, "none of its 2 rows fits: 1 wrong number"
    )


def test_the_lines_of_many_bad_rows_are_not_all_kept(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\n" + 'u,"a,1\n' * 40_000)
    counts = import_files(source, tmp_path / "out", TableOptions(bad_rows="skip"))
    assert (counts.bad_rows["stray quote"].count, counts.bad_rows["stray quote"].places) == (40_000, [3, 4, 5, 6, 7])


def test_a_table_of_titles_has_the_same_rules(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\nu,b,2\nu,c,3\n")
    items = tmp_path / "items.csv"
    for content, words in (
        ("item,brand,title\na,Black, Decker,Drill\n", ["line 2: expected 3 fields, found 4"]),
        ('item,title\na,7" drill\n', ["line 2: a quote inside"]),
        ('item,title\na,"A\nb,B\nc,C"\n', ["line 2: a quoted field goes on to line 3, which is a row"]),
        ("item,title\n,A\n", ["line 2: expected an item id, found nothing"]),
        ("1,A\n2,B\n", ["line 1: '1' looks like data", "--items-columns"]),
    ):
        write(items, content)
        refused(
            lambda: import_files(source, tmp_path / "out", TableOptions(items=items)), tmp_path, "items.csv", *words
        )
    write(items, 'item,title\na,7" drill\nb,"B\nb"\n,D\nc,C\n')
    counts = import_files(source, tmp_path / "out", TableOptions(items=items, bad_rows="skip"))
    assert table(tmp_path / "out") == {"a": "a", "b": "B b", "c": "C"}
    assert [kind.places for kind in counts.bad_title_rows.values()] == [[2], [5]]
    write(items, "a,A\nb,B\n")
    options = TableOptions(items=items, item_column="a", title_column="A", columns=("user", "a", "timestamp"))
    refused(lambda: import_files(source, tmp_path / "new", options), tmp_path, "'user' and 'item' look like names")
    write(source, "u,a,1\n")
    refused(
        lambda: import_files(source, tmp_path / "new", options), tmp_path, "items.csv line 1", "'a' is also one of its"
    )
    options = TableOptions(items=items, items_columns=("item", "title"), columns=("user", "item", "timestamp"))
    import_files(source, tmp_path / "whole", options)
    assert table(tmp_path / "whole") == {"a": "A"}


def test_a_file_without_a_header_loses_no_row(tmp_path):
    source = write(tmp_path / "in.csv", "u1,a,5.0,11\nu1,b,5.0,12\nu1,c,4.0,13\n")
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "line 1: '5.0' looks like data", "--columns")
    for user, item, time in (("u1", "a", "11"), ("u1", "a", "5.0")):
        options = TableOptions(user_column=user, item_column=item, timestamp_column=time)
        refused(lambda options=options: import_files(source, tmp_path / "out", options), tmp_path, "looks like data")
    for names in ("user,item,-,timestamp", "user,item,_,timestamp", "user,item,rating,timestamp"):
        out = tmp_path / names
        assert import_files(source, out, TableOptions(columns=names.split(","))).rows == 3
        assert history(out) == "u1\ta b c\n"
    for names, words in (
        ("user,item,timestamp", ["line 1: expected 3 fields, found 4"]),
        ("user,item,item,timestamp", ["--columns", "'item' twice"]),
        ("user,,item,timestamp", ["--columns", "an empty name"]),
        ("user,item,-,time", ["no column 'timestamp'"]),
    ):
        options = TableOptions(columns=names.split(","))
        refused(lambda options=options: import_files(source, tmp_path / "out", options), tmp_path, *words)
    write(source, "who,what,when\nwho,a,1\n")
    options = TableOptions(user_column="who", item_column="what", timestamp_column="when")
    refused(lambda: import_files(source, tmp_path / "out", options), tmp_path, "'who' is also one of its values")
    write(source, ",0,1,2\n0,u,a,1\n1,u,b,2\n")  # columns that pandas has counted
    import_files(source, tmp_path / "counted", TableOptions(user_column="0", item_column="1", timestamp_column="2"))
    assert history(tmp_path / "counted") == "u\ta b\n"


def test_recbole_refuses_what_is_no_atomic_file(tmp_path, caplog):
    head = "user_id:token\titem_id:token\ttimestamp:float"
    inter = tmp_path / "in.inter"
    for content, words in (
        ("user_id\titem_id\ttimestamp\nu\ta\t1\n", ["line 1", "fields with types", "found 'user_id'"]),
        ("u\ta\t1\n", ["line 1", "fields with types", "found 'u'"]),
        ("user_id:float\titem_id:token\ttimestamp:float\n1\ta\t1\n", ["'user_id:float': expected user_id:token"]),
        (f"{head}\nu\ta\t1\nu\tb\n", ["line 3: expected 3 fields, found 2"]),
        (f"{head}\nu\ta\t1\nu\tb\t1\t2\n", ["line 3: expected 3 fields, found 4"]),
    ):
        write(inter, content)
        refused(lambda: import_recbole(inter, tmp_path / "out"), tmp_path, "in.inter", *words)
    write(inter, f'{head}\ttags:token_seq\nu\ta\t1\tx y\nu\tb"\t2\t"\n')
    assert import_recbole(inter, tmp_path / "out").rows == 2
    assert history(tmp_path / "out") == 'u\ta b"\n'
    assert "fields of sequences that are not read: tags" in caplog.text


def test_lists_of_items_and_ids_like_names_are_no_histories_and_no_data(tmp_path):
    """Fields of a .item file describe items, and a header with types is no row, whatever the ids are."""
    write(tmp_path / "in.inter", "name:token\titem_id:token\ttimestamp:float\nname\ta\t1\n")
    write(tmp_path / "in.item", "item_id:token\ttitle:token_seq\tgenre_list:token_seq\na\tSaw\tx y\n")
    import_recbole(tmp_path / "in.inter", tmp_path / "out", TableOptions(user_column="name"))
    assert (history(tmp_path / "out"), (tmp_path / "out" / "items.tsv").read_text()) == ("name\ta\n", "a\tSaw\n")


def test_one_column_has_one_meaning(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\n")
    for options in (TableOptions(user_column="item"), TableOptions(item_column="timestamp")):
        refused(lambda options=options: import_files(source, tmp_path / "out", options), tmp_path, "has two meanings")


def test_microlens_rows(tmp_path):
    source = microlens(tmp_path / "in", "u,a,1\nu,b,2,3\nu,c\nu,c,3\n")
    refused(lambda: import_microlens(source, tmp_path / "out"), tmp_path, "line 2: expected 3 fields, found 4")
    counts = import_microlens(source, tmp_path / "out", ImportOptions(bad_rows="skip"))
    assert (history(tmp_path / "out"), counts.rows) == ("u\ta c\n", 4)
    assert counts.bad_rows["wrong number of fields"].places == [2, 3]


def test_parquet_rows(tmp_path):
    frame = pl.DataFrame({"user": ["u", None, "u", "u", ""], "item": ["a", "b", "c d", "e", "f"], "timestamp": 1})
    frame = frame.with_columns(pl.Series("timestamp", [1, 2, 3, None, 5]))
    frame.write_parquet(tmp_path / "in.parquet")
    refused(lambda: import_files(tmp_path / "in.parquet", tmp_path / "out"), tmp_path, "row 2: user", "found nothing")
    counts = import_files(tmp_path / "in.parquet", tmp_path / "out", TableOptions(bad_rows="skip"))
    assert (history(tmp_path / "out"), counts.rows) == ("u\ta\n", 5)
    assert {name: kind.places for name, kind in counts.bad_rows.items()} == {
        "bad user": [2, 5],
        "bad item": [3],
        "no timestamp": [4],
    }
    for column, kind in (("user", "List"), ("item", "Boolean"), ("timestamp", "Boolean")):
        values = [[True]] if kind == "Boolean" else [[["a"]]]
        pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [1], column: values[0]}).write_parquet(
            tmp_path / "in.parquet"
        )
        words = (f"column {column!r} holds {kind}", "expected")
        refused(lambda words=words: import_files(tmp_path / "in.parquet", tmp_path / "new"), tmp_path, *words)
    decimals = pl.Series("timestamp", ["1.5"]).str.to_decimal(scale=1)
    pl.DataFrame([pl.Series("user", ["u"]), pl.Series("item", ["a"]), decimals]).write_parquet(tmp_path / "in.parquet")
    import_files(tmp_path / "in.parquet", tmp_path / "new")
    assert (tmp_path / "new" / "times.tsv").read_text() == "u\t1500000\n"


def test_large_timestamps_in_any_spelling_stay_exact(tmp_path):
    out = imported_csv(tmp_path, HEADER + f"u,a,{2**62 + 1}.0\nu,b,{2**53 + 1}.00\nu,c,9007199254740995e0\n")
    assert (out / "times.tsv").read_text() == f"u\t{2**53 + 1} {2**53 + 3} {2**62 + 1}\n"


def test_files_that_are_no_files_are_refused(tmp_path):
    fifo = tmp_path / "fifo.csv"
    os.mkfifo(fifo)
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\n")
    for read in (import_files, import_files, import_recbole):
        refused(lambda read=read: read(fifo, tmp_path / "out"), tmp_path, "fifo.csv", "found a FIFO")
    refused(lambda: import_files(source, tmp_path / "out", TableOptions(items=fifo)), tmp_path, "found a FIFO")


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 100)
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\n" + "x" * 3000 + "\n")
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "in.csv line 3: longer than")


FIELD = st.text(st.sampled_from('ab",\n\r\t é;\x1e\x1f\0'), max_size=6)


@st.composite
def csv_texts(draw) -> tuple[str, list[list[str]]]:
    """Draw rows of five fields and a legal CSV text of them, by Python's writer."""
    rows = draw(st.lists(st.lists(FIELD, min_size=5, max_size=5), max_size=12))
    # Python's writer leaves a carriage return without quotes unless it is a part of the line end.
    quoting, end = draw(st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\n")]))
    file = io.StringIO()
    csv.writer(file, quoting=quoting, lineterminator=end).writerows(rows)
    return file.getvalue(), rows


@settings(max_examples=40, deadline=None)
@given(csv_texts(), st.sampled_from([3, 50, 1 << 20]))
def test_rows_and_fields_are_those_of_pythons_reader(tmp_path_factory, text_and_rows, block_bytes):
    text, rows = text_and_rows
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    path.write_bytes(text.encode() or b"\n")
    assert list(csv.reader(io.StringIO(text, newline=""), strict=True)) == rows
    names = list("vwxyz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        bad_rows = BadRows(path, "error", "line")
        batches = list(DelimitedText(path, ",", columns=names).batches(dict(zip(names, names)), bad_rows))
    read = [list(row) for batch in batches for row in batch.select(names).fill_null("").iter_rows()]
    blank = str.maketrans("\x1e\x1f\r", "   ")
    expected = [[field.translate(blank).strip(" ") for field in row] for row in rows]
    assert [[field.translate(blank).strip(" ") for field in row] for row in read] == expected


def damaged(text: bytes, where: float, piece: bytes, in_place: bool) -> bytes:
    place = round(where * len(text))
    return text[:place] + piece + text[place + in_place :]


PIECES = st.sampled_from(
    [b'"', b",", b"\n", b"\r", b"\r\n", b"\t", b"\0", b"\xff", b"\x1b", b'""', b'","', b'"\n"', b" "]
)
EDITS = st.lists(st.tuples(st.floats(0, 1), PIECES | st.binary(max_size=2), st.booleans()), max_size=4)
QUOTED = "".join(f'u{n % 3},"i{n % 5}",{n},"some, ""text"" {n}"\n' for n in range(8))


def outcome(path, policy: str, block_bytes: int) -> tuple:
    """Return the rows, in text, that fit and the kinds of the others; or the error's message."""
    names = list("wxyz")
    bad_rows = BadRows(path, policy, "line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        try:
            batches = list(DelimitedText(path, ",", columns=names).batches(dict(zip(names, names)), bad_rows))
        except InputError as error:
            return str(error), {}
    rows = [row for batch in batches for row in batch.iter_rows()]
    return rows, {name: (kind.count, kind.places) for name, kind in bad_rows.kinds.items()}


def check_damage(folder, edits) -> None:
    """Check that damaged text is refused or skipped alike, however it is cut into blocks, and that no line is lost."""
    content = QUOTED.encode()
    for edit in edits:
        content = damaged(content, *edit)
    path = folder / "in.csv"
    path.write_bytes(content)
    whole = outcome(path, "skip", 1 << 20)
    assert outcome(path, "skip", 3) == whole
    strict = outcome(path, "error", 1 << 20)
    rows, kinds = whole
    if isinstance(rows, str):  # the whole file is refused, as one that only begins like gzip
        assert strict == whole
    elif not kinds:
        assert strict == whole
        if b'\\"' in content:  # a quote after a backslash, which Python's reader takes for one of RFC 4180
            return
        lines = io.StringIO(content.decode(), newline="")
        parsed = [row for row in csv.reader(lines, skipinitialspace=True) if "".join(row).strip()]
        assert len(parsed) == len(rows)
    else:
        first = min(places[0] for _, places in kinds.values())
        assert f"in.csv line {first}: " in strict[0]


@settings(max_examples=50, deadline=None)
@given(EDITS)
@example([(0.0, b"\x1f\x8b", False)])
def test_damaged_text_is_read_alike_in_any_blocks(tmp_path_factory, edits):
    check_damage(tmp_path_factory.mktemp("damage"), edits)


@pytest.mark.long
@settings(max_examples=2000, deadline=None)
@given(EDITS, st.sampled_from(["csv", "inter", "microlens"]))
def test_no_damage_is_a_traceback(tmp_path_factory, edits, kind):
    """Damage whole imports, which are made or are refused in one line."""
    folder = tmp_path_factory.mktemp("damage")
    check_damage(folder, edits)
    separator = "," if kind != "inter" else "\t"
    head = {"csv": NAMED, "inter": "user_id:token\titem_id:token\ttimestamp:float\tname:token\n", "microlens": ""}[kind]
    content = (
        head + "".join(separator.join((f"u{n % 3}", f"i{n % 5}", f"{n}", "x")) + "\n" for n in range(8))
    ).encode()
    for edit in edits:
        content = damaged(content, *edit)
    logging.disable(logging.WARNING)
    for policy in ("error", "skip"):
        out = folder / policy
        try:
            if kind == "csv":
                import_files(write(folder / "in.csv", content), out, TableOptions(bad_rows=policy))
            elif kind == "inter":
                import_recbole(write(folder / "in.inter", content), out, TableOptions(bad_rows=policy))
            else:
                source = microlens(folder / f"microlens {policy}", content)
                import_microlens(source, out, ImportOptions(bad_rows=policy))
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and not out.exists()
    logging.disable(logging.NOTSET)
