"""Values that can be read and are likely to mean something else: a warning names them, or they are refused."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import pytest

pytest.importorskip("polars")

from helpers.import_sources import HEADER, imported_csv, refused, write
from iisan_fast.data.imports.flat import import_files

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
