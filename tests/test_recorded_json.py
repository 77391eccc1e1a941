"""Recorded JSON: an object is read as it is meant, and anything else is one line that names the place."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iisan_fast import recorded_json
from iisan_fast.errors import InputError
from iisan_fast.recorded_json import MOST_LEVELS, parse_json_object
from iisan_fast.settings_files import read_settings

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.none() | st.booleans() | st.integers(-(10**38), 10**38) | TEXT
VALUES = st.recursive(
    PLAIN | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=10,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(TEXT, VALUES))
def test_what_json_writes_is_read(values):
    assert parse_json_object(json.dumps(values), "f") == values
    assert parse_json_object(json.dumps(values, ensure_ascii=False).encode(), "f") == values


@settings(max_examples=30, deadline=None)
@given(st.binary() | st.text() | st.dictionaries(TEXT, VALUES).map(json.dumps), st.data())
def test_other_bytes_are_one_line(content, data):
    """Cut and change JSON anywhere: an object of finite numbers, or one line."""
    content = bytearray(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert type(parse_json_object(bytes(content), "the file")) is dict
    except InputError as error:
        assert str(error).startswith("the file: ") and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("null", "expected a JSON object, found null"),
        ("[1]", "expected a JSON object, found list"),
        ("", "not valid JSON (Expecting value"),
        ('{"a": 1} {}', "not valid JSON (Extra data"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": [-Infinity]}', "-Infinity is no number of JSON"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        (f'{{"a": {"9" * 5000}}}', "a number of 5000 digits"),
        ('{"a": {"b": 1, "b": 1}}', '"b" stands twice in an object'),
        (r'{"a": "\ud800"}', "text that is not Unicode"),
        (r'{"a": [{"\udfff": 1}]}', "text that is not Unicode"),
        (b'{"a": "\xff"}', "expected JSON in UTF-8, found other bytes at 7"),
        ('{"a": ' * 51 + "1" + "}" * 51, "more than 50 levels"),
        ('{"a": ' + "[" * 100_000, "more than 50 levels"),
    ],
)
def test_a_mistake_is_named(tmp_path, content, problem):
    file = tmp_path / "file.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: parse_json_object(content, file), lambda: read_settings(file)):
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).startswith(f"{file}: ") and problem in str(error.value)


def test_the_limits_themselves_are_admitted(monkeypatch):
    for value in (10**39, -(10**38), math.ulp(0.0), 1.7976931348623157e308, "\udcff"):  # the last is of a file's name
        assert parse_json_object(json.dumps({"a": value}), "f") == {"a": value}
    deep = '{"a": ' * (MOST_LEVELS - 1) + "{}" + "}" * (MOST_LEVELS - 1)
    assert json.dumps(parse_json_object(deep, "f")) == deep
    monkeypatch.setattr(recorded_json, "MOST_JSON_BYTES", 8)
    assert parse_json_object('{"a": 1}', "f") == {"a": 1}
    with pytest.raises(InputError, match="f: expected at most 8 bytes of JSON, found 9"):
        parse_json_object('{"a": 10}', "f")


def test_a_sparse_file_of_a_gigabyte_is_not_read(tmp_path):
    file = tmp_path / "file.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 30)
    with pytest.raises(InputError, match="expected at most 16777216 bytes of settings, found more"):
        read_settings(file)
