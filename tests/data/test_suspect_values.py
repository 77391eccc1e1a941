"""What can be read and is likely to mean something else: a warning names it, or it is refused."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import pytest

pytest.importorskip("polars")

from helpers.import_sources import HEADER, imported_csv, microlens, refused, table, write
from iisan_fast.data.imports.families.microlens import import_microlens
from iisan_fast.data.imports.families.recbole import import_recbole
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions

SECOND = 1_600_000_000


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (HEADER + "u,a,1\nNA,b,2\nNA,a,3\n", {}, "user ids that look like missing values: 'NA' (2 interactions)"),
        (HEADER + "u,nan,1\nv,b,2\n", {}, "item ids that look like missing values: 'nan' (1 interactions)"),
        ('user,item\nu,"b,a"\nv,a\n', {}, "1 of 2 item ids hold a comma, semicolon or bar, such as 'b,a'"),
        (HEADER + f"u,a,{SECOND}\nu,b,{SECOND - 9}000\n", {}, "times look like seconds and milliseconds"),
        (HEADER + f"u,a,{SECOND}\nNancy,b,{SECOND + 1}\n", {}, None),
        ('user,item\nu,"b|x,a"\nv,a\n', {"item_separator": ","}, None),
        (HEADER + "u,a,0\nu,b,1600000000000\n", {}, None),
        (HEADER + f"u,a,{SECOND}.5\nu,b,{SECOND}\n", {}, None),
    ],
)
def test_what_is_likely_to_mean_something_else_is_named(tmp_path, caplog, content, options, words):
    imported_csv(tmp_path, content, **options)
    warned = [message for message in caplog.messages if "look like" in message or "item ids hold" in message]
    assert len(warned) == (words is not None) and (words is None or words in warned[0])


@pytest.mark.parametrize(
    "row", ["u,\\N,1", "\\N,a,1", "u,[1 2 3 ... 8 9],1", "u,['a' 'b' ... 'z'],1", '"u","[1, ..., 9]",1']
)
def test_a_missing_value_of_a_database_and_a_shortened_list_are_refused(tmp_path, row):
    path = write(tmp_path / "in.csv", HEADER + "u,b,1\n" + row + "\n")
    refused(lambda: import_files(path, tmp_path / "out"), tmp_path, "line 3: ")


@pytest.mark.parametrize(
    "header", ["uid,iid", "user_id,item_id", "userId,movieId", "User-ID,ISBN", "customer_id,article_id"]
)
def test_a_header_is_no_row_of_a_file_said_to_have_none(tmp_path, header):
    path = write(tmp_path / "in.csv", header + "\nu,a\nv,b\n")
    options = TableOptions(columns=["user", "item"])
    refused(lambda: import_files(path, tmp_path / "out", options), tmp_path, "line 1", *header.split(","), "--columns")


def test_ids_that_are_no_names_of_columns_stay_a_row(tmp_path):
    out = imported_csv(tmp_path, "u1,iid\nuser,a\n", columns=["user", "item"])
    assert (out / "users.tsv").read_text() == "u1\tiid\nuser\ta\n"


def test_titles_of_other_ids_are_refused_if_the_user_names_them(tmp_path):
    write(tmp_path / "items.csv", "item,title\n10,A\n11,B\n")
    path = write(tmp_path / "in.csv", HEADER + "u,10.0,1\nu,0011,2\n")
    options = TableOptions(items=tmp_path / "items.csv")
    words = ("items.csv: none of its ids", "0011, 10.0", "found 10, 11", "--items")
    refused(lambda: import_files(path, tmp_path / "out", options), tmp_path, *words)


def test_titles_of_other_ids_that_lie_beside_the_interactions_are_said(tmp_path, caplog):
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\nu\ta\n")
    write(tmp_path / "x.item", "item_id:token\ttitle:token_seq\n1\tA\n")
    import_recbole(tmp_path / "x.inter", tmp_path / "out")
    assert "x.item: none of its ids is an item's: expected ids such as a, found 1" in caplog.text


@pytest.mark.parametrize(("encoding", "is_said"), [("utf-8", True), ("latin-1", False)])
def test_utf_8_that_is_read_as_another_encoding_is_said(tmp_path, caplog, encoding, is_said):
    imported_csv(tmp_path, (HEADER + "u,é,1\n").encode(encoding), encoding="latin-1")
    assert ("in.csv: looks like UTF-8" in caplog.text) == is_said


@pytest.mark.parametrize("separator", [",", " ", ";", "|"])
def test_separators_of_recbole_are_found_by_looking(tmp_path, separator):
    rows = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t3\nu\tb\t1.0\n"
    write(tmp_path / "x.inter", rows.replace("\t", separator))
    write(tmp_path / "x.item", "item_id:token\ttitle:token_seq\na\tThe A, B\nb\tB\n")
    import_recbole(tmp_path / "x.inter", tmp_path / "out")
    assert (tmp_path / "out" / "users.tsv").read_text() == "u\tb a\n"
    assert table(tmp_path / "out") == {"a": "The A, B", "b": "B"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"\x80\x04\x95\x00", "pickle"),
        (b"SQLite format 3\0", "SQLite"),
        (b"ARROW1\0\0", "Feather"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_files_of_other_programs_are_named(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    refused(lambda: import_files(path, tmp_path / "out"), tmp_path, f"{name}: ", words)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    path = write(tmp_path / "MicroLens-50k_pairs.csv", HEADER + "u,a,1\n")
    refused(lambda: import_microlens(path, tmp_path / "out"), tmp_path, "is a file; name the folder")


def test_covers_that_are_none_are_refused(tmp_path):
    path = write(tmp_path / "in.csv", HEADER + "u,a,1\n")
    (tmp_path / "covers").mkdir()
    write(tmp_path / "covers" / "README", "none")
    write(tmp_path / "covers.zip", b"PK\x03\x04")
    write(tmp_path / "a.jpg", b"\xff\xd8")
    for name, words in (("covers", "holds no image"), ("covers.zip", "unpack it"), ("a.jpg", "is one image")):
        options = TableOptions(covers=tmp_path / name)
        refused(lambda options=options: import_files(path, tmp_path / "out", options), tmp_path, f"{name}: ", words)


def test_covers_of_microlens_that_are_still_packed_are_named(tmp_path, caplog):
    source = microlens(tmp_path / "in")
    write(source / "MicroLens-50k_covers.zip", b"PK\x03\x04")
    assert import_microlens(source, tmp_path / "out").items_without_cover is None
    assert "MicroLens-50k_covers.zip is not read" in caplog.text
