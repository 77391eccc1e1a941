"""The strict reader of tables: the lines that it accepts, and the file and line that its errors name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.data.strict_tables import read_table
from iisan_fast.errors import InputError

LineWriter = Callable[[bytes], Path]


@pytest.fixture
def table(tmp_path: Path) -> LineWriter:
    def write(content: bytes) -> Path:
        path = tmp_path / "table.tsv"
        path.write_bytes(content)
        return path

    return write


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_table_gives_line_numbers_and_fields(table: LineWriter) -> None:
    assert list(read_table(table(b"a\tb c\nd\t\xc3\xa9\n"), 2)) == [(1, ["a", "b c"]), (2, ["d", "é"])]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa\tb\r\nc\td", b"a\tb\nc\td\r\n", b"a\tb\nc\td"])
def test_table_accepts_byte_order_mark_carriage_returns_and_no_last_newline(table: LineWriter, content: bytes) -> None:
    assert [fields for _, fields in read_table(table(content), 2)] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"a\tb\n\nc\td\n", "line 2: empty line"),
        (b"a\tb\n\r\n", "line 2: empty line"),
        (b"a\tb\nc\n", "line 2: expected 2 fields separated by tabs, found 1"),
        (b"a\tb\tc\n", "line 1: expected 2 fields separated by tabs, found 3"),
        (b"a\tb\n\tc\n", "line 2: field 1 of 2 is empty"),
        (b"a\x1bc\tb\n", "line 1: id 'a\\x1bc' has a control character"),
        ("a\tb\n\x85c\tb\n".encode(), "line 2: id '\\x85c' has a control character"),
        (b"a\tb\n" + b"x" * 4097 + b"\tb\n", "line 2: an id of 4,097 bytes; expected at most 4,096"),
        (b"a\t \n", "line 1: field 2 of 2 is empty"),
        (b"a\tb\nc\t\xff\n", "line 2: not UTF-8 (at byte 3)"),
        ("a\tb\n".encode("utf-16"), "line 1: not UTF-8 (at byte 1)"),
    ],
)
def test_malformed_table_names_file_and_line(table: LineWriter, content: bytes, message: str) -> None:
    path = table(content)
    with pytest.raises(InputError) as error:
        list(read_table(path, 2))
    assert str(path) in one_line(error)
    assert message in one_line(error)


def test_missing_table_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.tsv: no such file"):
        list(read_table(tmp_path / "absent.tsv", 2))
    (tmp_path / "link.tsv").symlink_to("gone.tsv")
    with pytest.raises(InputError, match="link.tsv: a link to gone.tsv, which is not there; restore it"):
        list(read_table(tmp_path / "link.tsv", 2))
    with pytest.raises(InputError, match="expected a regular file, found a folder"):
        list(read_table(tmp_path, 2))


def test_table_streams(table: LineWriter) -> None:
    rows = read_table(table(b"a\tb\n\n"), 2)
    assert next(rows) == (1, ["a", "b"])
    with pytest.raises(InputError):
        next(rows)


field = st.text(st.characters(exclude_characters="\ufeff", exclude_categories=["Cc", "Cs"]), min_size=1)


@given(st.lists(st.tuples(field, field, field), min_size=1))
def test_table_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]) -> None:
    rows = [row for row in rows if all(text.strip() for text in row)] or [("a", "b", "c")]
    path = tmp_path_factory.mktemp("table") / "t.tsv"
    path.write_bytes("".join("\t".join(row) + "\n" for row in rows).encode())
    assert [tuple(fields) for _, fields in read_table(path, 3)] == rows


def test_a_list_of_ids_is_asked_for_as_one_field(table: LineWriter) -> None:
    with pytest.raises(InputError, match=r"line 2: expected 1 field, found 2$"):
        list(read_table(table(b"a\nb\tc\n"), 1))
