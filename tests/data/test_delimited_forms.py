"""Every common form of delimited text is read as it is written, or refused in one line that says what to do."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pl = pytest.importorskip("polars")

from helpers.import_sources import HEADER, TIMES, UNORDERED, USERS, refused, table, write
from iisan_fast.data.imports.bad_rows import BadRows
from iisan_fast.data.imports.families.recbole import import_recbole
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions
from iisan_fast.data.imports.text import delimited, delimited_rows, text_stream
from iisan_fast.data.imports.text.delimited import DelimitedText
from iisan_fast.data.table_files import read_table_file

PLAIN = HEADER + UNORDERED
RATINGS = "u2,b,4,30\nu1,a,5,20\nu2,a,5,10\nu1,c,1,10\nu1,b,3,20\nu2,a,5,10\n"
COLUMNS = ("user", "item", "-", "timestamp")


def histories(tmp_path, content: str | bytes, name: str = "in.csv", **options) -> tuple[str, str]:
    """Import a file and return the content of users.tsv and of times.tsv."""
    import_files(write(tmp_path / name, content), tmp_path / "out", TableOptions(**options))
    return (tmp_path / "out" / "users.tsv").read_text(), (tmp_path / "out" / "times.tsv").read_text()


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::", " ", "   ", ", ", " , ", "; ", "\t\t", "||", " | "])
@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "ratings.dat"])
def test_a_plain_separator_is_found_whatever_the_suffix(tmp_path, separator, name):
    assert histories(tmp_path, PLAIN.replace(",", separator), name) == (USERS, TIMES)


@pytest.mark.parametrize(
    ("separator", "option"),
    [
        *((",", "comma"), ("\t", "tab"), ("\t", r"\t"), ("\t", "\t"), (";", "semicolon"), ("|", "bar"), ("|", "PIPE")),
        *((" ", "space"), ("  ", " "), (" ", r"\s+"), ("::", "::"), ("||", "||"), ("^", "^"), (":", "colon")),
        *(("\x01", r"\x01"), ("§", "§"), ("<>", "<>"), ("; ", ";"), (";", "; ")),
    ],
)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_a_separator_that_is_named_is_used_with_and_without_a_header(
    tmp_path, monkeypatch, separator, option, block_bytes
):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    assert histories(tmp_path, PLAIN.replace(",", separator), separator=option) == (USERS, TIMES)
    (tmp_path / "bare").mkdir()
    content = RATINGS.replace(",", separator)
    assert histories(tmp_path / "bare", content, separator=option, columns=COLUMNS) == (USERS, TIMES)


def test_movielens_as_it_is_unpacked(tmp_path):
    """Read 1M's files in Latin-1 with double colons, and 100K's with tabs and bars, none with a header."""
    movies = 'a::Misérables, Les (1995)::Drama|Musical\nb::"Great Ones": Cats (1998)::Musical\nc::7" (1999)::Drama\n'
    items = write(tmp_path / "movies.dat", movies.encode("latin-1"))
    options = {"columns": COLUMNS, "items": items, "items_columns": ("item", "title", "-"), "encoding": "latin-1"}
    assert histories(tmp_path, RATINGS.replace(",", "::"), "ratings.dat", **options) == (USERS, TIMES)
    titles = {"a": "Misérables, Les (1995)", "b": '"Great Ones": Cats (1998)', "c": '7" (1999)'}
    assert table(tmp_path / "out") == titles
    for separator in (None, "tab"):
        folder = tmp_path / f"100k {separator}"
        folder.mkdir()
        films = "a|Misérables, Les (1995)|01-Jan-1995||http://x?a,b (c)|0|1\nb|B; b|01-Jan-1996|||0|0\n\n"
        items = write(folder / "u.item", films.encode("latin-1"))
        options |= {"items": items, "items_columns": ("item", "title", *"-----"), "separator": separator}
        assert histories(folder, RATINGS.replace(",", "\t"), "u.data", **options) == (USERS, TIMES)
        assert table(folder / "out") == {"a": "Misérables, Les (1995)", "b": "B; b", "c": "c"}


def test_spaces_beside_separators_belong_to_no_field_and_those_within_titles_stay(tmp_path):
    items = write(tmp_path / "items.csv", 'item, title\na, "A, ""a"""\n "b" ,B  of   b \nc ,"C"\n')
    content = " user , item , timestamp\n" + UNORDERED.replace(",", " , ").replace("\n", "  \n")
    assert histories(tmp_path, content, items=items) == (USERS, TIMES)
    assert table(tmp_path / "out") == {"a": 'A, "a"', "b": "B of b", "c": "C"}


@pytest.mark.parametrize(
    ("rows", "titles"),
    [
        (['a\t7" saw', 'b\t"Great" cats', 'c\t"x"'], {"a": '7" saw', "b": '"Great" cats', "c": '"x"'}),
        (['a\t"7"" saw"', 'b\t"B\nx\ty"', 'c\t"x"'], {"a": '7" saw', "b": "B x y", "c": "x"}),
        (['a\tx "', "b\ty", 'c\tz "'], {"a": 'x "', "b": "y", "c": 'z "'}),
    ],
)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_quotes_between_other_separators_are_what_most_rows_say(tmp_path, monkeypatch, rows, titles, block_bytes):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    items = write(tmp_path / "items.tsv", "\n".join(["item\ttitle", *rows, ""]))
    histories(tmp_path, PLAIN, items=items)
    assert table(tmp_path / "out") == titles


def test_quotes_after_a_backslash(tmp_path):
    """Read lines as MySQL writes them, beside lines whose fields end with a backslash."""
    rows = (r'"a";"\"A\" and \"\"b";"x"', r'"b";"C:\";"y"', '"c";"plain ""C""";"z"')
    items = write(tmp_path / "items.csv", "\n".join(['"item";"title";"note"', *rows, ""]))
    assert histories(tmp_path, PLAIN, items=items) == (USERS, TIMES)
    assert table(tmp_path / "out") == {"a": '"A" and ""b', "b": "C:\\", "c": 'plain "C"'}


def test_a_late_quote_decides_how_quotes_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited_rows, "LOOKED_AT", 100)
    monkeypatch.setattr(delimited, "LOOKED_AT", 100)
    for number, late in enumerate(('u2\ta\t10\t7" saw\n', 'u2\ta\t10\t"7"" saw"\n')):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = "".join(line.replace(",", "\t") + "\tx\n" for line in UNORDERED.splitlines()[:-1])
        content = "user\titem\ttimestamp\tname\n" + rows + late
        assert histories(folder, content) == (USERS, TIMES)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\r\r\n"),
        PLAIN.rstrip("\n"),
        PLAIN + "\n   \n\r\n",
        "\ufeff" + PLAIN,
        "sep=;\n" + PLAIN.replace(",", ";"),
        PLAIN.replace("\n", ",\n"),
        HEADER + UNORDERED.replace("\n", ",\n"),
        HEADER.replace("\n", ",\n") + UNORDERED,
        "".join(f"{at - 1 if at else ''},{line}\n" for at, line in enumerate(PLAIN.splitlines())),
        HEADER + "".join(f"{at},{line}\n" for at, line in enumerate(UNORDERED.splitlines(), start=1)),
        "".join(f'{f"{at!r} " if at else ""}"{line}"\n' for at, line in enumerate(PLAIN.splitlines())).replace(
            ",", '" "'
        ),
        f",{PLAIN}",
    ],
)
def test_common_ways_to_write_a_table(tmp_path, content):
    """Read line ends of all systems, blank lines at the end, and columns without a name that count the rows."""
    assert histories(tmp_path, content) == (USERS, TIMES)


def test_a_column_too_many_is_no_index_unless_it_counts_the_rows(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + "7,u,a,1\n8,u,b,2\n5,u,c,3\n")
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "line 2: expected 3 fields, found 4")


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        *(
            ("cp1252", "Misérables “x”"),
            ("latin-1", "Misérables"),
            ("gbk", "卧虎藏龙"),
            ("shift_jis", "となりのトトロ"),
        ),
        *(
            ("koi8-r", "Война и мир"),
            ("utf-16-le", "Ж世"),
            ("utf-16-be", "Ж世"),
            ("UTF8", "Ж世"),
            ("cp037", "Misérables"),
        ),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_an_encoding_that_is_named_is_read(tmp_path, monkeypatch, encoding, word, block_bytes):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    items = write(tmp_path / "items.csv", f'item,title\na,"{word}, 1"\nb,B\n'.encode(encoding))
    assert histories(tmp_path, PLAIN.encode(encoding), items=items, encoding=encoding) == (USERS, TIMES)
    assert table(tmp_path / "out") == {"a": f"{word}, 1", "b": "B", "c": "c"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress], ids=str.split("no gz bz2 xz"))
def test_a_byte_order_mark_and_a_compression_are_found(tmp_path, encoding, compress):
    mark = "\ufeff" if encoding in ("utf-16-be", "utf-8") else ""
    assert histories(tmp_path, compress((mark + PLAIN).encode(encoding)), "in.data") == (USERS, TIMES)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (
            b"u,a,1,x\nu,b,2,Les Mis\xe9rables\n",
            {},
            ["3: not UTF-8 (byte 0xe9 at 14)", "like cp1252: --encoding cp1252"],
        ),
        (b"u,a,1,Caf\xe9\n", {"encoding": "ascii"}, ["line 2: not ascii (byte 0xe9 at 10)", "--encoding cp1252"]),
        (b"u,\x81,1,\xe9\n", {"encoding": "cp1252"}, ["line 2: not cp1252 (byte 0x81 at 3)"]),
        (b'u,a,1,"x\ny \xe9"\n', {}, ["line 2: not UTF-8 (byte 0xe9 at 3 of the row's line 2)"]),
        (
            "u,a,1,é\nu,b,1,é\n".encode() + b"u,c,1,\xc3\n",
            {},
            ["line 4: not UTF-8", "other lines are UTF-8; correct it"],
        ),
        (
            "u,a,1,臥虎藏龍\nu,b,1,悲情城市\n".encode("big5"),
            {},
            ["line 2: not UTF-8 (byte 0xaa at 7)", "--encoding big5"],
        ),
        ("u,a,1,Война и мир\n".encode("cp1251"), {}, ["line 2: not UTF-8 (byte 0xc2 at 7)", "--encoding cp1251"]),
    ],
)
def test_another_encoding_is_named_with_line_and_byte(tmp_path, rows, options, words):
    source = write(tmp_path / "in.csv", b"user,item,timestamp,name\n" + rows)
    refused(lambda: import_files(source, tmp_path / "out", TableOptions(**options)), tmp_path, "in.csv line", *words)


def test_bytes_of_another_encoding_in_the_header_and_in_rows_to_skip(tmp_path, monkeypatch):
    source = write(tmp_path / "in.csv", "user,item,timestamp,prénom\nu,a,1,x\n".encode("latin-1"))
    words = ["in.csv line 1: not UTF-8 (byte 0xe9 at 23)", "--encoding cp1252"]
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, *words)
    write(source, b"user,item,timestamp\nu,a,1\nu,\xff,2\nu,c,3\n")
    counts = import_files(source, tmp_path / "skipped", TableOptions(bad_rows="skip", encoding="ascii"))
    assert {name: kind.places for name, kind in counts.bad_rows.items()} == {"not ascii": [3]}
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    words = ["line 3: not UTF-8 (byte 0xff at 3); name its encoding with --encoding", "pip install charset-normalizer"]
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, *words)


def test_the_encoding_of_recboles_files(tmp_path):
    source = write(tmp_path / "x.inter", "user_id:token\titem_id:token\nu\ta\n")
    write(tmp_path / "x.item", "item_id:token\ttitle:token_seq\na\tCafé\n".encode("latin-1"))
    words = ("x.item line 2: not UTF-8 (byte 0xe9 at 6)", "--encoding cp1252", "save the file as UTF-8")
    refused(lambda: import_recbole(source, tmp_path / "out"), tmp_path, *words)
    import_recbole(source, tmp_path / "out", TableOptions(encoding="cp1252"))
    assert table(tmp_path / "out") == {"a": "Café"}


@pytest.mark.parametrize("name", ["nope", "idna", "rot13", "base64", "undefined", "", "a\0b"])
def test_an_unknown_encoding_is_refused(tmp_path, name):
    source = write(tmp_path / "in.csv", PLAIN)
    options = TableOptions(encoding=name)
    refused(
        lambda: import_files(source, tmp_path / "out", options), tmp_path, "--encoding: expected an encoding of text"
    )


def zipped(content: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.csv", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped(PLAIN), ["a zip archive", "unzip it first"]),
        (b"\x28\xb5\x2f\xfd" + bytes(9), ["packed by Zstandard", "unzstd"]),
        (bytes(257) + b"ustar", ["a tar archive", "tar -xf"]),
        (gzip.compress(bytes(257) + b"ustar" + bytes(300)), ["a tar archive", "tar -xf"]),
        (bz2.compress(PLAIN.encode())[:-9], ["cannot be read as a table"]),
        ("<!DOCTYPE html>\n<html>\n", ["line 1: looks like a web page"]),
        (PLAIN.encode("utf-16-be"), ["--encoding utf-16-be"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["no header of names"]),
        (PLAIN.replace(",", "^"), ["line 1: no plain separator", "'user^item^timestamp'", "--separator"]),
        ("user,item|x,timestamp|z\nu,a|x,1|z\n", ["line 1: no plain separator", "--separator"]),
        ("user\nu\n", ["line 1: no plain separator", "'user'"]),
        ("u1\ta\t5\t10\nu1\tb\t5\t11\n", ["line 1: '5' looks like data of a file without a header", "--columns"]),
        ("u1::a::5::10\nu1::b::5::11\n", ["line 1: '5' looks like data of a file without a header", "--columns"]),
    ],
    ids=str.split("zip zst tar tgz bz2 html utf16 png caret several one tab colons"),
)
def test_what_is_no_plain_text_is_refused_with_what_to_do(tmp_path, content, words):
    source = write(tmp_path / "in.csv", content)
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "in.csv", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"separator": "tab"}, ["line 1: expected tabs between fields, found commas", "leave out --separator"]),
        ({"separator": "a"}, ["--separator: expected comma, tab", "found 'a'"]),
        ({"separator": ""}, ["--separator: expected"]),
        ({"separator": '"'}, ["--separator: expected"]),
        ({"columns": ("user", "item", "timestamp")}, ["line 1: names the columns", "leave out --columns"]),
    ],
)
def test_an_option_that_does_not_fit_is_refused(tmp_path, options, words):
    source = write(tmp_path / "in.csv", PLAIN)
    refused(lambda: import_files(source, tmp_path / "out", TableOptions(**options)), tmp_path, *words)


def test_rows_that_do_not_fit_are_counted_whatever_separates_fields(tmp_path):
    rows = ("user item timestamp", "u a 1", "u b", "u c 3 4", "", "  u  d   5  ", 'u "e" 6', "u f x")
    for number, separator in enumerate((" ", "::", ", ")):
        source = write(tmp_path / "in.csv", "\n".join(" ".join(row.split()).replace(" ", separator) for row in rows))
        counts = import_files(source, tmp_path / str(number), TableOptions(bad_rows="skip", separator=separator))
        assert (tmp_path / str(number) / "users.tsv").read_text() == "u\ta d e\n"
        assert {name: kind.places for name, kind in counts.bad_rows.items()} == {
            "wrong number of fields": [3, 4],
            "empty line": [5],
            "bad timestamp": [8],
        }


def test_tables_of_other_commands_may_have_other_separators(tmp_path):
    for content in ("user_id;note\nu;a, b\nv;\n", "user_id\tnote\nu\ta, b\nv\t\n"):
        frame = read_table_file(write(tmp_path / "in.csv", content), "users")
        assert frame.rows() == [("u", "a, b"), ("v", None)]
    assert read_table_file(write(tmp_path / "one.csv", "user_id\nu\n"), "users").rows() == [("u",)]
    refused(
        lambda: read_table_file(write(tmp_path / "in.csv", b"user_id,note\nu,\xe9\n"), "users"),
        tmp_path,
        "in.csv line 2: not UTF-8 (byte 0xe9 at 3)",
        "save the file as UTF-8",
    )


def test_a_long_file_without_newlines_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "HEAD_BYTES", 40)
    for number, end in enumerate(("\r", "\r\r\n", "\n")):
        (tmp_path / str(number)).mkdir()
        assert histories(tmp_path / str(number), PLAIN.replace("\n", end)) == (USERS, TIMES)


ALPHABETS = {"utf-8": "é世", "utf-16": "é世😀", "cp1252": "é€", "gb18030": "世é", "koi8-r": "ж"}
NAMES = list("vwxyz")


@st.composite
def written_texts(draw) -> tuple[str, str, str | None, list[list[str]]]:
    """Draw rows, and the text of them that Python's writer makes, its encoding and its separator, None to find it."""
    encoding = draw(st.sampled_from(sorted(ALPHABETS)))
    field = st.text(st.sampled_from('ab",;|\t\n:^ ' + ALPHABETS[encoding]), max_size=5)
    rows = draw(st.lists(st.lists(field, min_size=5, max_size=5), min_size=1, max_size=9))
    separator = draw(st.sampled_from([*",\t;|^ "]))
    quotings = (csv.QUOTE_ALL,) if separator == " " else (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)
    file = io.StringIO()
    end = draw(st.sampled_from(["\n", "\r\n"]))
    csv.writer(file, delimiter=separator, quoting=draw(st.sampled_from(quotings)), lineterminator=end).writerows(
        [NAMES, *rows]
    )
    return file.getvalue(), encoding, separator if separator == "^" else None, rows


@settings(max_examples=60, deadline=None)
@given(written_texts(), st.sampled_from([3, 50, 1 << 20]))
def test_rows_of_pythons_writer_are_read_back(tmp_path_factory, written, block_bytes):
    text, encoding, separator, rows = written
    path = write(tmp_path_factory.mktemp("text") / "in.csv", text.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        table = DelimitedText(path, separator, encoding=None if encoding.startswith("utf") else encoding)
        batches = list(table.batches(dict(zip(NAMES, NAMES)), BadRows(path, "error", "line")))
    read = [row for batch in batches for row in batch.select(NAMES).fill_null("").rows()]
    assert table.columns == NAMES
    assert read == [tuple(field.strip(" ") for field in row) for row in rows]
