"""Tables of texts: what is read, and the one clear line that every kind of bad input gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from iisan_fast.data.items import read_items
from iisan_fast.errors import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_items_keep_file_order_and_unescape_entities(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("b\tNuts &amp; Bolts\na\tPlain\n")
    assert read_items(tmp_path).ids == ["b", "a"]
    assert read_items(tmp_path).titles == ["Nuts & Bolts", "Plain"]
    assert read_items(tmp_path, unescape=False).titles[0] == "Nuts &amp; Bolts"
    assert read_items(tmp_path).captions is None


def test_captions_may_be_fewer_than_items(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("a\tA\nb\tB\n")
    (tmp_path / "captions.tsv").write_text("b\tIt&#39;s blue\n")
    assert read_items(tmp_path).captions == {"b": "It's blue"}


@pytest.mark.parametrize(
    ("items", "captions", "message"),
    [
        ("a\tA\nb\tB\na\tC\n", "a\tx\n", "items.tsv line 3: item 'a' stands on line 1 already"),
        ("a\tA\nb\tB\n", "a\tx\na\ty\n", "captions.tsv line 2: item 'a' stands on line 1 already"),
        ("a\tA\nb\tB\n", "a\tx\nc\ty\n", "captions.tsv line 2: item 'c' is not in items.tsv"),
        ("a b\tA\n", "a b\tx\n", "items.tsv line 1: item id 'a b' has a space or NUL"),
    ],
)
def test_bad_items_and_captions(tmp_path: Path, items: str, captions: str, message: str) -> None:
    (tmp_path / "items.tsv").write_text(items)
    (tmp_path / "captions.tsv").write_text(captions)
    with pytest.raises(InputError) as error:
        read_items(tmp_path)
    assert message in one_line(error)
