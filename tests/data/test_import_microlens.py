"""Imports of MicroLens: pairs, histories, titles and covers; unusual files are read, wrong files are refused."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import pytest

pytest.importorskip("polars")

from helpers.import_sources import HEADER, TIMES, UNORDERED, USERS, microlens, refused, table, write
from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.imports.families.microlens import import_microlens
from iisan_fast.data.imports.options import ImportOptions
from iisan_fast.errors import InputError


@pytest.mark.parametrize(
    "pairs",
    [
        UNORDERED,
        HEADER + UNORDERED,
        UNORDERED.replace("\n", "\r\n").removesuffix("\r\n"),
        b"\xef\xbb\xbf" + UNORDERED.encode(),
        b"\xef\xbb\xbf" + (HEADER + UNORDERED).replace("\n", "\r\n").encode(),
    ],
    ids=["bare", "header", "windows", "mark", "windows with mark and header"],
)
def test_microlens_pairs(tmp_path, pairs):
    counts = import_microlens(microlens(tmp_path / "in", pairs), tmp_path / "out")
    assert (tmp_path / "out" / "users.tsv").read_text() == USERS
    assert (tmp_path / "out" / "times.tsv").read_text() == TIMES
    assert (tmp_path / "out" / "items.tsv").read_text() == "b\tB\na\tA\nc\tC\n"
    assert (counts.users, counts.items, counts.interactions, counts.dropped_interactions) == (2, 3, 6, 0)
    assert (counts.items_without_title, counts.items_without_cover) == (0, None)
    assert (tmp_path / "out").stat().st_mode & 0o777 == tmp_path.joinpath("in").stat().st_mode & 0o777


def test_microlens_histories_without_timestamps(tmp_path):
    source = microlens(tmp_path / "in")
    (source / "MicroLens-50k_pairs.csv").unlink()
    write(source / "MicroLens-50k_pairs.tsv", "u9\t c  a a\r\nu1\tb \r\nu9\tb\r\n")
    assert import_microlens(source, tmp_path / "out").interactions == 5
    assert (tmp_path / "out" / "users.tsv").read_text() == "u9\tc a a b\nu1\tb\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items.tsv", "users.tsv"]


@pytest.mark.parametrize(
    "header", ["user\titem", "User\tItems", "user_id\titem_ids", "userID\tvideo_id", "user\thistory"]
)
def test_a_header_of_microlens_histories_is_no_user(tmp_path, header):
    source = microlens(tmp_path / "in")
    (source / "MicroLens-50k_pairs.csv").unlink()
    write(source / "MicroLens-50k_pairs.tsv", f"{header}\r\nuser1\titem1 c\r\nu1\tb\r\n")
    assert import_microlens(source, tmp_path / "out").rows == 2
    assert (tmp_path / "out" / "users.tsv").read_text() == "user1\titem1 c\nu1\tb\n"


def test_microlens_titles(tmp_path, caplog):
    """Keep commas, quoted or not; squeeze whitespace; leave out a header and items without interactions."""
    titles = (
        '\ufeffitem,title\r\na,"Cats, ""dogs"" and\r\n birds"\r\nb,One, two,\tthree \r\nc,\r\nz,Not here\r\na,"Cats, '
    )
    titles += '""dogs"" and birds"\r\n'
    import_microlens(microlens(tmp_path / "in", titles=titles), tmp_path / "out")
    assert table(tmp_path / "out") == {"a": 'Cats, "dogs" and birds', "b": "One, two, three", "c": "c"}
    assert "no title for 1 of 3 items (c): their ids stand for it" in caplog.messages


def test_microlens_titles_that_are_not_valid_csv(tmp_path):
    """Split at the first comma and keep the quotes; an unclosed quote does not swallow the next lines."""
    for name, titles, expected in (
        ("within", 'a,"Hello" world, "again"\r\nb,B\nc,"C, ""c"""\n', ('"Hello" world, "again"', "B", 'C, "c"')),
        ("until another", 'a,"A, a\nb,B\nc,"C"\n', ('"A, a', "B", "C")),
        ("until the end", 'a,A\nb,"B\nc,C', ("A", '"B', "C")),
        ("until the row after the next", 'a,"A, a\nb,B\nc,C"\n', ('"A, a', "B", 'C"')),
        ("over lines that are no rows", 'a,"A\nand, a"\nb,B\nc,"C\n\nd, e"', ("A and, a", "B", "C d, e")),
        ("in every line", 'a,"A" \nb,"B\nc,"C', ('"A"', '"B', '"C')),
    ):
        import_microlens(microlens(tmp_path / name, titles=titles), tmp_path / f"{name} out")
        assert table(tmp_path / f"{name} out") == dict(zip("abc", expected))


def test_items_without_a_title_can_be_dropped_or_refused(tmp_path):
    source = microlens(tmp_path / "in", titles="a,A\nc,C\nb, \n")
    counts = import_microlens(source, tmp_path / "out", ImportOptions(missing_titles="drop"))
    assert (counts.users, counts.items, counts.interactions, counts.dropped_interactions) == (2, 2, 4, 2)
    assert (tmp_path / "out" / "users.tsv").read_text() == "u2\ta a\nu1\tc a\n"
    assert list(table(tmp_path / "out")) == ["a", "c"]
    options = ImportOptions(missing_titles="error")
    refused(lambda: import_microlens(source, tmp_path / "new", options), tmp_path, "no title for 1 of 3 items (b)")
    write(source / "MicroLens-50k_title_en.csv", "")
    options = ImportOptions(missing_titles="drop")
    refused(lambda: import_microlens(source, tmp_path / "new", options), tmp_path, "nothing is left")
    with pytest.raises(InputError, match="missing_titles: expected one of id, drop, error, found 'keep'"):
        ImportOptions(missing_titles="keep")


def test_microlens_covers_are_linked_or_copied(tmp_path, caplog):
    source = microlens(tmp_path / "in")
    covers = source / "MicroLens-50k_covers"
    covers.mkdir()
    for name in ("a.jpg", "b.PNG", "z.jpg"):
        write(covers / name, name)
    for copy in (False, True):
        out = tmp_path / f"copied {copy}"
        assert import_microlens(source, out, ImportOptions(copy_covers=copy)).items_without_cover == 1
        assert (out / "images").is_symlink() != copy
        with open_images(out) as images:
            assert [images.content(item) for item in "abc"] == [b"a.jpg", b"b.PNG", None]
        assert (out / "images" / "z.jpg").exists() != copy
    assert "no cover for 1 of 3 items (c): extract with missing_images: blank fills them" in caplog.messages
    write(covers / "a.png", "")
    refused(lambda: import_microlens(source, tmp_path / "new"), tmp_path, "two images of item 'a'")


def test_microlens_folder_must_hold_one_dataset(tmp_path):
    source = microlens(tmp_path / "in")
    write(source / "MicroLens-100k_pairs.csv", UNORDERED)
    refused(lambda: import_microlens(source, tmp_path / "out"), tmp_path, "*_pairs.csv", "100k", "folder of its own")
    (tmp_path / "empty").mkdir()
    refused(lambda: import_microlens(tmp_path / "empty", tmp_path / "out"), tmp_path, "empty", "found neither")
    refused(lambda: import_microlens(tmp_path / "none", tmp_path / "out"), tmp_path, "none: no such folder")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ("", ["empty"]),
        ("1,2\n", ["line 1", "expected user,item,timestamp", "found '1,2'"]),
        ("user,item,when\n1,2,3\n", ["line 1", "expected user,item,timestamp", "found 'user,item,when'"]),
        ("PAR1\x15\x04\n", ["line 1", r"found 'PAR1\x15\x04'"]),
        ("1,2,3\n1,2,x\n", ["line 2: timestamp: expected a number", "found 'x'"]),
        ("1,2,3\n1,2,3,4\n", ["line 2: expected 3 fields, found 4 in '1,2,3,4'"]),
    ],
)
def test_malformed_microlens_pairs(tmp_path, pairs, words):
    source = microlens(tmp_path / "in", pairs)
    refused(lambda: import_microlens(source, tmp_path / "out"), tmp_path, "pairs.csv", *words)


def test_malformed_microlens_titles(tmp_path):
    titles = "a,A\nb,\xff\n".encode("latin-1")
    source = microlens(tmp_path / "in")
    write(source / "MicroLens-50k_title_en.csv", titles)
    refused(lambda: import_microlens(source, tmp_path / "out"), tmp_path, "title_en.csv", "line 2", "not UTF-8")


def test_malformed_microlens_histories(tmp_path):
    source = microlens(tmp_path / "in")
    (source / "MicroLens-50k_pairs.csv").unlink()
    for row, shown in (("u2\t ", "nothing"), ("u2\t", "nothing"), ("u2", "1 in 'u2'"), ("", "an empty line")):
        write(source / "MicroLens-50k_pairs.tsv", f"u1\ta b\n{row}\nu3\tb\n")
        refused(lambda: import_microlens(source, tmp_path / "out"), tmp_path, "pairs.tsv line 2", f"found {shown}")
