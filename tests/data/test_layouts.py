"""Each layout that docs/importing.md names, as a tiny file: the command imports it with the right histories."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("polars")

from helpers.layouts import LAYOUTS
from iisan_fast.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "importing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_imported_with_the_right_histories(tmp_path, monkeypatch, capfd, name):
    layout = LAYOUTS[name]
    monkeypatch.chdir(tmp_path)
    for file, content in layout.files.items():
        path = tmp_path / "in" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        main(["import", *shlex.split(layout.command)])
    assert ended.value.code == 0, capfd.readouterr().err
    out = tmp_path / "OUT"
    assert (out / "users.tsv").read_text() == layout.users
    for file, expected in (("times.tsv", layout.times), ("splits.tsv", layout.splits)):
        if expected is not None or file == "splits.tsv":
            assert (out / file).exists() == (expected is not None)
        if expected is not None:
            assert (out / file).read_text() == expected
    titles = dict(line.split("\t") for line in (out / "items.tsv").read_text(encoding="utf-8").splitlines())
    assert {item: titles[item] for item in layout.titles} == dict(layout.titles)


def test_the_page_lists_the_layouts_that_are_tried_and_their_commands():
    section = PAGE.partition("## Layouts")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|`]+) \| [^|]+ \| `([^|`]+)` \|$", section, re.MULTILINE)
    assert rows == [(name, layout.shown) for name, layout in LAYOUTS.items()]
