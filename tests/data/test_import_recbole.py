"""Imports of RecBole's files: histories beside interactions, given splits, pieces, and titles under other names."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("polars")

from helpers.import_sources import refused, table, write
from iisan_fast.data.imports.families.recbole import import_recbole
from iisan_fast.data.imports.options import TableOptions

HEAD = "user_id:token\titem_id:token\ttimestamp:float"
LISTS = f"{HEAD}\titem_id_list:token_seq\ttimestamp_list:float_seq"


def lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


def inter(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write(path, "\n".join([header, *rows]).replace(" | ", "\t") + "\n")


@pytest.mark.parametrize(
    ("rows", "history"),
    [
        (("u | b | a", "u | c | a b", "u | d | a b c"), "a b c d"),  # whole lists
        (("u | b | a", "u | c | a b", "u | d | b c", "u | a | c d"), "a b c d a"),  # lists cut to two
        (("u | d | a b c", "u | b | a", "u | c | a b"), "a b c d"),  # the longest first
        (("u | b | a", "u | e | a b c d"), "a b c d e"),  # rows between them are left out
        (("u | b | a", "u | a | a b", "u | b | a b a"), "a b a b"),  # items come again
        (("u | d | a b c",), "a b c d"),
        (("u | a | ", "u | b | a"), "a b"),  # the first row has no list
    ],
)
def test_the_list_before_the_first_interaction_is_part_of_the_history(tmp_path, rows, history):
    source = inter(tmp_path / "in.inter", "user_id:token\titem_id:token\titem_id_list:token_seq", *rows)
    import_recbole(source, tmp_path / "out")
    assert lines(tmp_path / "out", "users.tsv") == [f"u\t{history}"]
    assert not (tmp_path / "out" / "times.tsv").exists()


def test_a_list_that_does_not_go_on_is_refused_or_left_out(tmp_path):
    rows = ("u | b | a", "u | d | x y", "u | c | a b")
    source = inter(tmp_path / "in.inter", "user_id:token\titem_id:token\titem_id_list:token_seq", *rows)
    refused(lambda: import_recbole(source, tmp_path / "out"), tmp_path, "line 3: the list of user 'u' does not go on")
    counts = import_recbole(source, tmp_path / "out", TableOptions(bad_rows="skip"))
    assert lines(tmp_path / "out", "users.tsv") == ["u\ta b c"]
    assert counts.bad_rows["list does not fit"].places == [3]
    refused(lambda: import_recbole(source, tmp_path / "new", TableOptions(min_rating=3)), tmp_path, "have no ratings")


def test_times_of_listed_items_are_read_or_none_are(tmp_path, caplog):
    source = inter(tmp_path / "in.inter", LISTS, "u | b | 7 | a | 5", "u | c | 9 | a b | 5 7")
    import_recbole(source, tmp_path / "out")
    assert lines(tmp_path / "out", "users.tsv") == ["u\ta b c"]
    assert lines(tmp_path / "out", "times.tsv") == ["u\t5 7 9"]
    import_recbole(source, tmp_path / "untimed", TableOptions(timestamp_column="-"))
    assert not (tmp_path / "untimed" / "times.tsv").exists()
    source = inter(tmp_path / "no-list.inter", f"{HEAD}\titem_id_list:token_seq", "u | b | 7 | a")
    import_recbole(source, tmp_path / "no-list")
    assert lines(tmp_path / "no-list", "users.tsv") == ["u\ta b"]
    assert "timestamp is not read, since the items of item_id_list have no times" in caplog.text


def test_a_row_a_user(tmp_path):
    source = inter(tmp_path / "in.inter", "user_id:token\titem_id:token_seq", "u | a b c", "v | b")
    import_recbole(source, tmp_path / "out")
    assert lines(tmp_path / "out", "users.tsv") == ["u\ta b c", "v\tb"]
    source = inter(tmp_path / "lists.inter", "user_id:token\titem_id_list:token_seq", "u | a b c", "v | b")
    import_recbole(source, tmp_path / "lists")
    assert lines(tmp_path / "lists", "users.tsv") == ["u\ta b c", "v\tb"]


def test_benchmark_files_are_a_given_split(tmp_path):
    folder = tmp_path / "beauty"
    inter(folder / "beauty.train.inter", HEAD, "u | a | 1", "u | b | 2", "v | a | 3")
    inter(folder / "beauty.valid.inter", HEAD, "u | c | 3")
    inter(folder / "beauty.test.inter", HEAD, "u | d | 4", "v | c | 9")
    write(folder / "beauty.item", "item_id:token\ttitle:token_seq\na\tA\n")
    import_recbole(folder, tmp_path / "out")
    assert lines(tmp_path / "out", "users.tsv") == ["u\ta b c d", "v\ta c"]
    assert lines(tmp_path / "out", "times.tsv") == ["u\t1 2 3 4", "v\t3 9"]
    assert lines(tmp_path / "out", "splits.tsv") == ["u\t2 1 1", "v\t1 0 1"]
    assert table(tmp_path / "out")["a"] == "A"


def test_lists_of_benchmark_files_are_training(tmp_path):
    """As RecBole's sequential benchmarks have it: a user of the test file alone keeps the history before it."""
    folder = tmp_path / "seq"
    inter(folder / "seq.train.inter", LISTS, "1 | 2 | 2 | 1 | 1", "1 | 3 | 3 | 1 2 | 1 2", "3 | 5 | 5 | 4 | 4")
    inter(folder / "seq.valid.inter", LISTS, "1 | 5 | 5 | 1 2 3 | 1 2 3")
    inter(folder / "seq.test.inter", LISTS, "1 | 7 | 7 | 2 3 5 | 2 3 5", "9 | 8 | 8 | 4 5 | 4 5")
    import_recbole(folder, tmp_path / "out")
    assert lines(tmp_path / "out", "users.tsv") == ["1\t1 2 3 5 7", "3\t4 5", "9\t4 5 8"]
    assert lines(tmp_path / "out", "times.tsv") == ["1\t1 2 3 5 7", "3\t4 5", "9\t4 5 8"]
    assert lines(tmp_path / "out", "splits.tsv") == ["1\t3 1 1", "3\t2 0 0", "9\t2 0 1"]


def test_pieces_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "ml"
    inter(folder / "ml.part10.inter", HEAD.removesuffix("\ttimestamp:float"), "u | c")
    inter(folder / "ml.part2.inter", HEAD.removesuffix("\ttimestamp:float"), "u | b")
    inter(folder / "ml.part1.inter", HEAD.removesuffix("\ttimestamp:float"), "u | a")
    import_recbole(folder, tmp_path / "pieces")
    assert lines(tmp_path / "pieces", "users.tsv") == ["u\ta b c"]
    assert not (tmp_path / "pieces" / "splits.tsv").exists()


def test_a_whole_file_is_read_alone(tmp_path, caplog):
    folder = tmp_path / "ml"
    inter(folder / "ml.inter", HEAD, "u | b | 2", "u | a | 1")
    inter(folder / "ml.train.inter", HEAD, "u | a | 1")
    inter(folder / "ml.test.inter", HEAD, "u | b | 2")
    import_recbole(folder, tmp_path / "out")
    assert lines(tmp_path / "out", "users.tsv") == ["u\ta b"]
    assert "ml.inter: read alone, without ml.test.inter, ml.train.inter beside it" in caplog.text


def test_files_of_several_datasets_or_of_one_part_are_refused(tmp_path):
    folder = tmp_path / "in"
    inter(folder / "a.inter", HEAD, "u | a | 1")
    inter(folder / "b.inter", HEAD, "u | a | 1")
    refused(lambda: import_recbole(folder, tmp_path / "out"), tmp_path, "found a.inter, b.inter", "name the file")
    folder = tmp_path / "parts"
    inter(folder / "a.train.inter", HEAD, "u | a | 1")
    inter(folder / "a.valid.inter", HEAD, "u | a | 1")
    inter(folder / "a.extra.inter", HEAD, "u | a | 1")
    refused(lambda: import_recbole(folder, tmp_path / "out"), tmp_path, "expected NAME.train.inter", "a.extra.inter")


def test_the_only_field_of_titles_is_read_whatever_its_name(tmp_path):
    source = inter(tmp_path / "ml.inter", HEAD, "u | a | 1")
    write(tmp_path / "ml.item", "item_id:token\tmovie_title:token_seq\trelease_year:token\na\tSaw\t2004\n")
    import_recbole(source, tmp_path / "out")
    assert table(tmp_path / "out") == {"a": "Saw"}
