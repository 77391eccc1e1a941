"""Fields of text that hold a list are read as the list: JSON, Python's and numpy's spellings."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

from pathlib import Path

import pytest

pl = pytest.importorskip("polars")

from helpers.import_sources import TIMES, USERS, imported_csv, write
from iisan_fast.data.imports.bad_rows import BadRows
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions
from iisan_fast.data.imports.rows.listed_texts import read_lists


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2,3]", ["1", "2", "3"]),
        ("""['a', "b's"]""", ["a", "b's"]),
        (" [4] ", ["4"]),
        ("[]", []),
        ("[1 2\n  3]", ["1", "2", "3"]),
        ("[a, b-1]", ["a", "b-1"]),
        ('["caf\\u00e9", "007"]', ["café", "007"]),
        ("['it\\'s']", ["it's"]),
        ("['a,b', 'c d']", ["a,b", "c d"]),
        ("[9007199254740993]", ["9007199254740993"]),
        ("plain", ["plain"]),
        ("[odd", ["[odd"]),
        ("[1,,2]", None),
        ("[null, 1]", None),
        ("[1, None]", None),
        ("[1.5]", None),
        ("[[1]]", None),
        ("[True]", None),
        ("[__import__('os')]", None),
    ],
)
def test_texts_of_lists(text, expected):
    bad_rows = BadRows(Path("in.csv"), "skip", "line")
    rows = pl.DataFrame({"item": ["[0]", text, None], "place": [1, 2, 3]})
    read = read_lists(rows, bad_rows)
    if expected is None:
        assert read["item"].to_list() == [["0"], None]
        assert bad_rows.kinds["bad item"].places == [2]
    else:
        assert read["item"].to_list() == [["0"], expected, None]
        assert not bad_rows.count


def test_columns_without_lists_stay_as_they_are():
    rows = pl.DataFrame({"item": ["a", "[b", None], "timestamp": [1, 2, 3], "place": [1, 2, 3]})
    assert read_lists(rows, BadRows(Path("in.csv"), "error", "line")).equals(rows)


def test_a_row_a_user_with_lists_of_items_and_times(tmp_path):
    content = (
        'user,item,timestamp\nu2,"[\'b\', \'a\', \'a\']","[30, 10, 10]"\nu1,"[""a"", ""c"", ""b""]","[20,10,20]"\n'
    )
    out = imported_csv(tmp_path, content)
    assert ((out / "users.tsv").read_text(), (out / "times.tsv").read_text()) == (USERS, TIMES)
    lines = '{"user": "u2", "item": ["b", "a", "a"], "timestamp": [30, 10, 10]}\n'
    lines += '{"user": "u1", "item": ["a", "c", "b"], "timestamp": [20, 10, 20]}\n'
    import_files(write(tmp_path / "in.jsonl", lines), tmp_path / "lines")
    assert (tmp_path / "lines" / "users.tsv").read_text() == USERS


def test_lists_of_unequal_lengths_are_bad_rows(tmp_path):
    content = 'user,item,timestamp\nu,"[1, 2]","[5]"\nu,"[3]","[6]"\nu,"[1, null]",4\n'
    write(tmp_path / "in.csv", content)
    counts = import_files(tmp_path / "in.csv", tmp_path / "out", TableOptions(bad_rows="skip"))
    assert (tmp_path / "out" / "users.tsv").read_text() == "u\t3\n"
    assert sorted(place for kind in counts.bad_rows.values() for place in kind.places) == [2, 4]
