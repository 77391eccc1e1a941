"""JSON lines and JSON arrays are read exactly: ids of any type, gzip, dicts of Python, and lines that do not fit."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import gzip
import json
import random

import pytest

pl = pytest.importorskip("polars")

from helpers.import_sources import write
from iisan_fast.data.imports.bad_rows import BadRows
from iisan_fast.data.imports.opening import open_table
from iisan_fast.data.imports.records import json_arrays, json_lines, line_blocks
from iisan_fast.errors import InputError

IDS = {"user": "user", "item": "item"}


def read(path, columns=IDS, policy="error"):
    """Return the rows of a file, each as a tuple that ends with its place, and {kind of bad rows: places}."""
    table = open_table(path)
    bad_rows = BadRows(path, policy, table.unit)
    rows = [row for batch in table.batches(columns, bad_rows) for row in batch.select(*columns, "place").rows()]
    return rows, {name: kind.places for name, kind in bad_rows.kinds.items()}


def lines(*objects):
    """Return objects as JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in objects)


def without_polars(monkeypatch):
    """Let all lines be read one by one."""
    monkeypatch.setattr(json_lines, "_read", lambda *_: None)


@pytest.mark.parametrize("by_line", [False, True])
@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_values_are_exact(tmp_path, monkeypatch, by_line, block):
    if by_line:
        without_polars(monkeypatch)
    monkeypatch.setattr(line_blocks, "BLOCK_BYTES", block)
    content = lines(
        {"user": 2**53 + 1, "item": "007", "x": [1]},
        {"item": "caf\u00e9 \U0001f600", "user": 2**64 - 1},
        {"user": 10**25, "item": 'a"\\/b'},
        {"user": "u"},
        {"user": None, "item": -3},
    )
    content += '\ufeff{"user": 1, "item": "\\ud83d"}\r\n{"user": "first", "user": "second", "item": 2}'
    rows, bad = read(write(tmp_path / "in.jsonl", content.replace("\ufeff", "")))
    assert rows == [
        (str(2**53 + 1), "007", 1),
        (str(2**64 - 1), "caf\u00e9 \U0001f600", 2),
        (str(10**25), 'a"\\/b', 3),
        ("u", None, 4),
        (None, "-3", 5),
        ("1", "\0", 6),  # half a character
        ("first", "2", 7),
    ]
    assert not bad


def test_random_values_are_the_same_line_by_line(tmp_path, monkeypatch):
    draw = random.Random(4)

    def value():
        return draw.choice(
            [
                draw.randrange(10),
                draw.randrange(2**70),
                str(draw.randrange(99)),
                "é\n",
                None,
                1.5,
                2.0,
                True,
                {"a": 1},
                [1],
            ]
        )

    monkeypatch.setattr(line_blocks, "BLOCK_BYTES", 300)
    for case in range(30):
        kinds = draw.choice([[int], [str], [int, str, float, bool, type(None)], [int, type(None)], [list, dict]])
        objects = []
        while len(objects) < 40:
            chosen = {"user": value(), "item": value(), "timestamp": draw.choice([1, 2, 3.5])}
            if all(type(chosen[name]) in kinds for name in IDS) or draw.random() < 0.02:
                objects.append(chosen)
        path = write(tmp_path / "in.json", lines(*objects))
        columns = {**IDS, "timestamp": "timestamp"}
        fast = read(path, columns, "skip")
        with pytest.MonkeyPatch.context() as patch:
            without_polars(patch)
            assert read(path, columns, "skip") == fast, case
        good = [row[-1] for row in fast[0]]
        bad = {place for places in fast[1].values() for place in places}
        assert bad.isdisjoint(good) and len(good) + len(bad) <= len(objects)


def test_lines_that_do_not_fit_are_counted_by_kind(tmp_path):
    good = lines({"user": "u", "item": "a"})
    odd = good + good + 'user,item\n[1]\n{"user": 1.5, "item": "a"}\n{"user": {"id": 1}, "item": "a"}\n'
    odd += '{"user": true, "item": "a"}\n\n{"user": "u", "item": "b"\n{"user": "u", "item": "tab\there"}\n'
    path = write(tmp_path / "in.jsonl", odd.encode() + b'{"user": "\xff", "item": 1}\n' + good.encode() + b"\n\n")
    rows, bad = read(path, policy="skip")
    assert [row[-1] for row in rows] == [1, 2, 10, 12]
    assert bad == {"no JSON object": [3, 4, 9], "bad user": [5, 6, 7], "not UTF-8": [11]}
    with pytest.raises(InputError, match="in.jsonl line 3: expected a JSON object, found 'user,item'; correct it"):
        read(path)
    path = write(tmp_path / "in.jsonl", lines({"user": "u", "item": "a"}, {"user": 1.5, "item": "a"}))
    with pytest.raises(InputError, match=r"line 2: user: expected text or a whole number, found 1\.5;"):
        read(path)


def test_whole_floats_are_ids_as_in_parquet(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"user": 7.0, "item": [1.0, 2]}\n{"user": -1e3, "item": 3}\n')
    assert read(path)[0] == [("7", ["1", "2"], 1), ("-1000", ["3"], 2)]
    path = write(tmp_path / "in.jsonl", '{"user": 9007199254740993.0, "item": 1}\n')  # no float is this number
    with pytest.raises(InputError, match=r"line 1: user: expected text or a whole number, found 9007199254740992\.0"):
        read(path)


def test_values_in_objects_and_lists(tmp_path, monkeypatch):
    objects = [
        {"user": {"id": 7}, "seen": [{"item": 1, "at": 5}, {"item": 2, "at": 6}], "items": ["a", "b"], "times": [1, 2]},
        {"user": {"id": 8}, "seen": [{"item": 3, "at": 5}], "items": [], "times": []},
    ]
    path = write(tmp_path / "in.jsonl", lines(*objects))
    nested = {"user": "user.id", "item": "seen.item", "timestamp": "seen.at"}
    lists = {"user": "user.id", "item": "items", "timestamp": "times"}
    for by_line in (False, True):
        if by_line:
            without_polars(monkeypatch)
        assert read(path, nested)[0] == [("7", ["1", "2"], [5, 6], 1), ("8", ["3"], [5], 2)]
        assert read(path, lists)[0] == [("7", ["a", "b"], [1, 2], 1), ("8", [], [], 2)]


def test_dicts_of_python_are_read_without_running_them(tmp_path, caplog):
    content = "{'asin': 'a', 'title': u'It\\'s \"it\"', 'price': None}\n{'asin': \"b\", 'title': 'B', 'x': True}\n"
    path = write(tmp_path / "meta.json.gz", gzip.compress(content.encode()))
    assert read(path, {"item": "asin", "title": "title"})[0] == [("a", 'It\'s "it"', 1), ("b", "B", 2)]
    assert "dicts of Python" in caplog.text
    sign = tmp_path / "sign"
    path = write(tmp_path / "meta.json", content + f"{{'asin': open({str(sign)!r}, 'w')}}\n")
    with pytest.raises(InputError, match="meta.json line 3: expected a JSON object"):
        read(path, {"item": "asin"})
    assert not sign.exists()


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_arrays_of_objects(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_arrays, "BLOCK_BYTES", block)
    objects = [{"user": 1, "item": "é,]"}, {"user": "u", "item": 22}, {"user": 1.5, "item": 1}, 12, {"user": "v"}]
    for indent in (None, 1):
        path = write(tmp_path / "in.json", json.dumps(objects, indent=indent, ensure_ascii=False))
        rows, bad = read(path, policy="skip")
        assert rows == [("1", "é,]", 1), ("u", "22", 2), ("v", None, 5)]
        assert bad == {"bad user": [3], "no JSON object": [4]}
    for text, words in (
        ('[{"user": 1, "item": 2}', "object 1: the array cannot be read on"),
        ('[{"user": 1, "item": 2}, {"user": oh}]', "object 2: the array cannot be read on .*jq"),
        ('[{"user": 1} {"user": 2}]', "object 2"),
    ):
        with pytest.raises(InputError, match=words):
            read(write(tmp_path / "in.json", text))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty; expected an object a line"),
        ("\n\n", "empty; expected an object a line"),
        ('{\n "user": 1\n}\n', "line 1: expected a JSON object, found '{'; write an object a line"),
        (
            '{"user": 1},\n{"user": 2},\n',
            "line 1: expected a JSON object, .*; remove the comma at the end of each line",
        ),
        (b'{"user": "\xe9"}\n', "line 1: not UTF-8; save the file as UTF-8$"),
        (lines({"user": 1, "article": 2}), "no column 'item', only user, article"),
    ],
)
def test_files_without_the_objects_that_are_read(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        read(write(tmp_path / "in.jsonl", content))


def test_a_truncated_file_is_named(tmp_path):
    content = gzip.compress(lines({"user": random.Random(0).randbytes(3000).hex(), "item": 1}).encode())[:-9]
    with pytest.raises(InputError, match="in.jsonl.gz: cannot be read as a table"):
        read(write(tmp_path / "in.jsonl.gz", content))
