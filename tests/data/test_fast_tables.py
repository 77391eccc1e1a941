"""Tables by polars and by the strict reader: equal datasets, equal errors, and who reads what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iisan_fast.config import ProtocolConfig
from iisan_fast.data import fast_tables, items, strict_tables
from iisan_fast.data.fast_tables import NeedsStrictReader, read_item_numbers, read_texts, read_whole_numbers
from iisan_fast.data.histories import read_histories
from iisan_fast.data.sequences import Dataset, load_dataset
from iisan_fast.errors import InputError

pl = pytest.importorskip("polars")

FILES = {
    "items.tsv": "a\tRed &amp; blue\nb\t\"quoted\"\nc\tNA\nd\t#1, 'x'\né\t 红色\u2028 \nf\tnull",
    "captions.tsv": "b\ttrue\nf\t1e5\n",
    "users.tsv": "u1\ta b c d é f\nu2\tf é d c b\n3\tb b c a b c\nu\xa04\ta c é a c\n",
    "times.tsv": "u1\t1 2 3 4 5 6\nu2\t1 1 3 5 6\n3\t-4 1 +2 03 4 9\nu\xa04\t2 3 4 5 6\n",
    "splits.tsv": "u1\t3 1 2\nu2\t2 +1 2\n3\t03 1 2\nu\xa04\t5 -0 0\n",
}
ODD = [
    *(
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        " ",
        "  ",
        "\0",
        '"',
        "'",
        ",",
        "\ufeff",
        "\x1c",
        "\x7f",
        "\x85",
        "\xa0",
        "\u2028",
    ),
    *("a", "zz", "u1\ta b c d f\n", "a\tagain\n", "\t\t", "-", "9" * 30, "1_0", "1.5", "٣", "x" * 3000, "é", "\\"),
]
DAMAGE = st.one_of(
    st.sampled_from([text.encode() for text in ODD] + [b"\xff", b"\xc3", b"\xed\xa0\x80"]), st.binary(max_size=3)
)
EDIT = st.tuples(st.sampled_from(sorted(FILES)), st.floats(0, 1), st.booleans(), DAMAGE)
TEMPORAL = ProtocolConfig(split="temporal", validation_from=0.6, test_from=0.8)
PROTOCOLS = {"leave-one-out": ProtocolConfig(), "temporal": TEMPORAL, "given": ProtocolConfig(split="given")}


@contextmanager
def readers(by_polars: bool, block_bytes: int = 16) -> Iterator[None]:
    """Read every file by polars, a few lines at a time, if it is plain; or hide polars."""
    with pytest.MonkeyPatch.context() as patch:
        if by_polars:
            patch.setattr(fast_tables, "LEAST_BYTES", 0)
            patch.setattr(fast_tables, "BLOCK_BYTES", block_bytes)
        else:
            patch.setitem(sys.modules, "polars", None)
        yield


@contextmanager
def no_strict_reader() -> Iterator[None]:
    """Fail if a table is read line by line."""

    def fail(path: Path, columns: int) -> Any:
        pytest.fail(f"{path} was read line by line")

    with pytest.MonkeyPatch.context() as patch:
        for module in ("items", "histories", "strict_tables"):
            patch.setattr(f"iisan_fast.data.{module}.read_table", fail)
        yield


def plain(dataset: Dataset) -> dict[str, Any]:
    """Return all that a dataset holds, as values that == compares, with the arrays' dtypes."""
    sequences = dataset.sequences
    arrays = {
        "offsets": sequences.offsets,
        "items": sequences.items,
        "training_ends": sequences.training_ends,
        **sequences.targets,
        **{f"{name}_counts": counts for name, counts in sequences.target_counts.items()},
    }
    return {
        "titles": dataset.titles,
        "captions": dataset.captions,
        "user_ids": sequences.user_ids,
        "item_ids": sequences.item_ids,
        **{name: (array.dtype, array.tolist()) for name, array in arrays.items()},
    }


def outcome(root: Path, protocol: ProtocolConfig) -> dict[str, Any] | str:
    """Return what load_dataset reads, or its error's message."""
    try:
        return plain(load_dataset(root, protocol))
    except InputError as error:
        return str(error)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


FILES_IN_BYTES = {name: text.encode() for name, text in FILES.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("block_bytes", [1, 16, 1 << 20])
def test_polars_reads_a_plain_dataset_alone_and_as_the_strict_reader_does(tmp_path, protocol, block_bytes):
    root = write(tmp_path, FILES_IN_BYTES)
    with readers(by_polars=True, block_bytes=block_bytes), no_strict_reader():
        dataset = plain(load_dataset(root, protocol))
    with readers(by_polars=False):
        assert dataset == plain(load_dataset(root, protocol))
    assert dataset["titles"][0] == "Red & blue" and dataset["titles"][1] == '"quoted"'


@settings(max_examples=250, deadline=None)
@given(st.lists(EDIT, max_size=2), st.sampled_from(sorted(PROTOCOLS)))
@example([("users.tsv", 0.0, False, b"\xef\xbb\xbf")], "leave-one-out")
@example([("users.tsv", 1.0, False, b"\n")], "leave-one-out")
@example([("times.tsv", 1.0, False, b"u5\t1 2 3 4 5\n")], "temporal")
@example([("splits.tsv", 1.0, False, b"u5\t1 2 3\n")], "given")
def test_both_readers_agree_on_whatever_stands_in_the_files(tmp_path_factory, edits, split):
    """An edit puts bytes into a file somewhere, in place of the byte that stands there or before it."""
    files = dict(FILES_IN_BYTES)
    for name, where, in_place, content in edits:
        place = round(where * len(files[name]))
        files[name] = files[name][:place] + content + files[name][place + in_place :]
    root = write(tmp_path_factory.mktemp("dataset"), files)
    protocol = PROTOCOLS[split]
    with readers(by_polars=False):
        expected = outcome(root, protocol)
    with readers(by_polars=True):
        assert outcome(root, protocol) == expected
    with readers(by_polars=True, block_bytes=1 << 20):
        assert outcome(root, protocol) == expected


field = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff"), min_size=1)


@settings(deadline=None)
@given(st.lists(st.tuples(field, field), min_size=1))
def test_polars_reads_every_plain_table(tmp_path_factory, rows):
    rows = [row for row in rows if all(text.strip() for text in row)] or [("a", "b")]
    path = tmp_path_factory.mktemp("table") / "t.tsv"
    path.write_bytes("".join(f"{first}\t{second}\n" for first, second in rows).encode())
    with readers(by_polars=True):
        assert list(zip(*read_texts(path))) == rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not two fields and one tab a line"),
        (b"a\tb\n\n", "not two fields and one tab a line"),
        (b"a\tb\r\nc\td\r\n", "not two fields and one tab a line"),
        (b"a\tb\rc\td\n", "not two fields and one tab a line"),
        (b"a\tb\tc\nd\n", "not two fields and one tab a line"),
        (b"a\t\nb\tc\n", "not two fields and one tab a line"),
        (b"a\tb\0\n", "not two fields and one tab a line"),
        (b"\xef\xbb\xbfa\tb\n", "a byte order mark"),
        (b"a\t\xff\n", "can't decode byte 0xff"),
        ("a\t\xa0\u3000\n".encode(), "a blank field"),
    ],
)
def test_the_strict_reader_is_asked_for_whatever_is_not_plain(tmp_path, content, reason):
    (tmp_path / "t.tsv").write_bytes(content)
    with readers(by_polars=True), pytest.raises(NeedsStrictReader, match=reason):
        read_texts(tmp_path / "t.tsv")


@pytest.mark.parametrize("words", ["a b c", "a  b", "a é", "z"])
def test_unknown_items_and_repeated_users_are_for_the_strict_reader(tmp_path, words):
    path = tmp_path / "users.tsv"
    path.write_text(f"u\t{words}\n", encoding="utf-8")
    with readers(by_polars=True):
        if words == "a b c":
            assert read_item_numbers(path, ["c", "b", "a"]).values.tolist() == [3, 2, 1]
            path.write_text("u\ta\nu\tb\n")
        with pytest.raises(NeedsStrictReader):
            read_item_numbers(path, ["c", "b", "a"])


@pytest.mark.parametrize("words", ["1.0", "1  2", "9223372036854775808", "1e3", "x", "1_0"])
def test_what_is_no_whole_number_is_for_the_strict_reader(tmp_path, words):
    path = tmp_path / "times.tsv"
    with readers(by_polars=True):
        path.write_text("u\t-9223372036854775808 9223372036854775807\n")
        limits = read_whole_numbers(path, ["u"]).values
        assert limits.tolist() == [-(2**63), 2**63 - 1] and limits.dtype == np.int64
        path.write_text(f"u\t{words}\n")
        with pytest.raises(NeedsStrictReader):
            read_whole_numbers(path, ["u"])


def test_polars_is_not_imported_for_small_files(tmp_path, monkeypatch):
    root = write(tmp_path, FILES_IN_BYTES)
    monkeypatch.delitem(sys.modules, "polars")
    read_histories(root, ["a", "b", "c", "d", "é", "f"], timed=True)
    items.read_items(root)
    assert "polars" not in sys.modules


def test_a_large_file_is_read_by_polars_without_being_asked(tmp_path):
    path = tmp_path / "items.tsv"
    lines = -(-fast_tables.LEAST_BYTES // 100)
    path.write_text("".join(f"item{line:06d}\t{'t' * 90}\n" for line in range(lines)))
    with no_strict_reader():
        assert len(items.read_items(tmp_path).ids) == lines
    assert len(list(strict_tables.read_table(path, 2))) == lines


def test_a_file_that_is_not_there_is_the_strict_readers_error(tmp_path):
    with readers(by_polars=True):
        assert outcome(tmp_path, TEMPORAL) == f"{tmp_path / 'items.tsv'}: no such file"
        write(tmp_path, {**FILES_IN_BYTES})
        (tmp_path / "times.tsv").unlink()
        assert outcome(tmp_path, TEMPORAL).startswith(f"{tmp_path / 'times.tsv'}: no such file; a temporal split")


@pytest.mark.slow
def test_both_readers_agree_on_real_data(scientific_folder):
    with readers(by_polars=True, block_bytes=1 << 18), no_strict_reader():
        dataset = plain(load_dataset(scientific_folder))
    with readers(by_polars=False):
        assert dataset == plain(load_dataset(scientific_folder))
