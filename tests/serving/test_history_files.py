"""Histories from files and from Python, in the numbers of a catalogue; each mistake is one line that says where."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from iisan_fast.errors import InputError
from iisan_fast.serving.growing.catalogue import Catalogue
from iisan_fast.serving.histories.history_arguments import numbered_histories
from iisan_fast.serving.histories.history_files import read_histories

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")

IDS = ["a", "007", "B 1", "c,d"]
EXPECTED = {"u1": [1, 2], "u2": [], "3": [4, 4, 1]}
USERS = {"u1": ["a", "007"], "u2": [], "3": ["c,d", "c,d", "a"]}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(
        IDS, None, np.array([0, 2, 1, 0, 0]), 4, np.array([False, True, False, False]), torch.ones(4, 2), None
    )


def write(path, users: dict[str, list[str]]):
    """Write histories in the format of the path's suffix, and return the path."""
    if path.suffix == ".tsv":
        path.write_text("".join(f"{user}\t{' '.join(history)}\n" for user, history in users.items()))
    elif path.suffix == ".csv":
        rows = "".join(f'{user},"{" ".join(history)}"\n' for user, history in users.items())
        path.write_text(f"user_id,history\n{rows}")
    elif path.suffix.lower() == ".jsonl":
        rows = [{"user_id": user, "history": history} for user, history in users.items()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        polars.DataFrame({"user_id": [*users], "history": [*users.values()]}).write_parquet(path)
    return path


def by_user(histories) -> dict[str, list[int]]:
    """Return the item numbers of each user."""
    parts = np.split(histories.items, histories.offsets[1:-1])
    return dict(zip(histories.user_ids, [part.tolist() for part in parts], strict=True))


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet", ".jsonl", ".JSONL"])
def test_each_format_gives_the_same_histories(catalogue, tmp_path, suffix):
    histories = read_histories(write((tmp_path / "users").with_suffix(suffix), USERS), catalogue, "error")
    assert by_user(histories) == EXPECTED and histories.offsets.dtype == histories.items.dtype == np.int64


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_null_is_an_empty_history(catalogue, tmp_path, suffix):
    path = write((tmp_path / "users").with_suffix(suffix), {"u1": ["a"], "u2": None})
    assert by_user(read_histories(path, catalogue, "error")) == {"u1": [1], "u2": []}


def test_interactions_are_histories_in_their_order(catalogue, tmp_path):
    path = tmp_path / "users.csv"
    path.write_text('user_id,item_id\n3,"c,d"\nu1,a\n3,"c,d"\nu1,007\n3,a\n')
    expected = {"3": [4, 4, 1], "u1": [1, 2]}
    assert by_user(read_histories(path, catalogue, "error")) == expected
    frame = polars.read_csv(path, infer_schema=False)
    frames = [frame, frame.to_pandas(), frame.to_arrow(), frame.to_dicts()]
    assert [by_user(numbered_histories(frame, catalogue, "error")) for frame in frames] == [expected] * 4


def test_histories_from_python(catalogue):
    frame = pandas.DataFrame({"user_id": ["u1", "u2", 3], "history": ["a 007", "", ["c,d", "c,d", "a"]]})
    for histories in (
        USERS,
        frame[:2],
        frame.to_dict("records")[2:],
        polars.DataFrame({"user_id": [3], "history": [["a"]]}),
    ):
        numbers = by_user(numbered_histories(histories, catalogue, "error"))
        assert numbers == (
            {"3": [1]} if isinstance(histories, polars.DataFrame) else {user: EXPECTED[user] for user in numbers}
        )
    lists = numbered_histories([USERS["u1"], ()], catalogue, "error")
    assert by_user(lists) == {"0": [1, 2], "1": []}


def test_unknown_ids_are_listed_and_left_out_where_asked(catalogue, tmp_path, caplog):
    path = write(tmp_path / "users.tsv", {"u1": ["a", "x"], "u2": ["y", "z", "w", "x", "007"]})
    message = r"found 4 unknown \(x, y, z and 1 more\), the first in .*users.tsv line 1; add them"
    message = f"users.tsv: expected ids of the run's 4 items, {message}"
    with pytest.raises(InputError, match=message):
        read_histories(path, catalogue, "error")
    assert by_user(read_histories(path, catalogue, "skip")) == {"u1": [1], "u2": [2]}
    assert "found 4 unknown (x, y, z and 1 more); they are left out" in caplog.text
    with pytest.raises(InputError, match="unknown: expected one of error, skip, found 'ignore'"):
        read_histories(path, catalogue, "ignore")


WRONG = {
    "no-suffix": (b"u1\ta\n", r"expected a file of users named \*.tsv, \*.csv, \*.parquet, \*.jsonl, found no suffix"),
    "empty.tsv": (b"", "empty.tsv: empty"),
    "empty.csv": (b"", "empty.csv"),
    "empty.jsonl": (b"\n", "empty.jsonl: holds no users"),
    "header.csv": (b"user_id,history\n", "header.csv: holds no users"),
    "twice.tsv": (b"u1\ta\nu2\ta\nu1\ta\n", "twice.tsv line 3: user 'u1' stands twice, first in .*twice.tsv line 1"),
    "twice.csv": (b"user_id,history\nu1,a\nu1,a\n", "twice.csv user 'u1': user 'u1' stands twice; join"),
    "title.tsv": (b"user_id\thistory\nu1\ta\n", "title.tsv line 1: expected a user id and item ids, found a header"),
    "blank.jsonl": (b'{"user_id": 1, "history": ["a", ""]}\n', r"found 1 unknown \(''\), the first in .* line 1"),
    "fields.tsv": (b"u1\ta\nu2\n", "fields.tsv line 2: expected 2 fields"),
    "spaces.tsv": (b"u1\ta  a\n", "spaces.tsv line 1: an empty item id"),
    "bytes.tsv": (b"u1\ta\nu2\t\xff\n", r"bytes.tsv line 2: not UTF-8 \(at byte 4\)"),
    "bytes.csv": (b"user_id,history\nu1,\xff\n", "bytes.csv.*UTF-8"),
    "bytes.jsonl": (b'{"user_id": "\xff"}\n', "bytes.jsonl line 1: not UTF-8"),
    "column.csv": (
        b"user_id,items\nu1,a\n",
        "column.csv: expected the columns user_id and history, .* found user_id, items",
    ),
    "user.csv": (b"user_id,history\nu1,a\n,a\n", "user.csv line 3: user_id: "),
    "field.jsonl": (
        b'{"user_id": "u1"}\n',
        "field.jsonl line 1: expected the fields user_id and history, found no history",
    ),
    "kind.jsonl": (
        b'{"user_id": 1, "history": {"a": 1}}\n',
        r"kind.jsonl line 1: history: expected a list of item ids.* found \{'a': 1\}",
    ),
    "none.jsonl": (b'{"user_id": 1, "history": ["a", null]}\n', "none.jsonl line 1: history: .* found nothing"),
    "text.jsonl": (b'{"user_id": 1, "history": "a"}\nwhat?\n', "text.jsonl line 2: expected a JSON object"),
    "damaged.parquet": (b"PAR1", "damaged.parquet: cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_its_line_or_user(catalogue, tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_histories(tmp_path / name, catalogue, "error")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet", ".jsonl"])
def test_what_is_no_regular_file_is_refused(catalogue, tmp_path, suffix):
    with pytest.raises(InputError, match="no such file"):
        read_histories(tmp_path / f"missing{suffix}", catalogue, "error")
    os.mkfifo(tmp_path / f"fifo{suffix}")
    with pytest.raises(InputError, match="expected a regular file, found a FIFO"):
        read_histories(tmp_path / f"fifo{suffix}", catalogue, "error")


def test_a_parquet_history_of_another_type_is_refused(catalogue, tmp_path):
    path = tmp_path / "users.parquet"
    polars.DataFrame({"user_id": ["u1"], "history": [7]}).write_parquet(path)
    with pytest.raises(InputError, match="users.parquet: history: expected a list of item ids.*, found Int64"):
        read_histories(path, catalogue, "error")


def test_text_files_are_read_without_polars(tmp_path):
    script = f"""
import sys
sys.modules["polars"] = None
import numpy as np, torch
from pathlib import Path
from iisan_fast.errors import InputError
from iisan_fast.serving.growing.catalogue import Catalogue
from iisan_fast.serving.histories.history_files import read_histories
catalogue = Catalogue(["a", "b"], None, np.zeros(3), 2, np.zeros(2, bool), torch.ones(2, 2), None)
for name in ("users.tsv", "users.jsonl", "users.csv"):
    try:
        print(*read_histories(Path({str(tmp_path)!r}) / name, catalogue, "error").items)
    except InputError as error:
        print(error)
"""
    for suffix in (".tsv", ".jsonl", ".csv"):
        write((tmp_path / "users").with_suffix(suffix), {"u": ["b", "a"]})
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[:2] == ["2 1"] * 2 and "pip install 'iisan-fast[import]'" in result.stdout


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ("a b", r'histories: expected a list of histories, such as \[\["A", "B"\]\]'),
        (["a"], r"histories\[0\]: expected a list of item ids"),
        ([["a"], [7]], r"histories\[1\]: expected item ids as text, found 7"),
        ({"u": None}, r"histories\['u'\]: expected a list of item ids"),
        ({1: ["a"], "1": ["a"]}, r"histories\['1'\]: user '1' stands twice"),
        (polars.DataFrame({"user": ["u"]}), "histories: expected the columns user_id and history.*, found user"),
        (polars.DataFrame({"user_id": ["u", "u"], "history": [["a"], ["a"]]}), "histories user 'u': .* stands twice"),
        ([{"user_id": None, "item_id": "a"}], "histories row 1: user_id: .* found nothing"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused(catalogue, histories, message):
    with pytest.raises(InputError, match=message):
        numbered_histories(histories, catalogue, "error")
