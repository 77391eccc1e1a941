"""The given split: by hand, beside a slow reference, every bad splits.tsv refused, and saved histories read again."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.command_line import refused
from iisan_fast.config import ProtocolConfig
from iisan_fast.data import fast_tables, given_split
from iisan_fast.data.reversed_users import with_reversed_users
from iisan_fast.data.saved_sequences import load_sequences
from iisan_fast.data.sequences import Sequences, load_dataset, statistics
from iisan_fast.errors import InputError

GIVEN = ProtocolConfig(split="given", max_inputs=2)
BY_HAND = {  # the interactions, and how many are for training, validation and the test
    "whole": ("a b c d e f g", (4, 1, 2)),
    "repeated": ("b c f f g c f", (2, 1, 4)),  # the test targets are f, g and c, of which f and c are in the history
    "trained": ("a b", (2, 0, 0)),
    "validated": ("a b", (1, 1, 0)),
    "new": ("h i", (0, 2, 0)),  # nothing comes before them
    "late": ("j k b", (0, 2, 1)),  # the test target has the validation part as its history
    "tested": ("l", (0, 0, 1)),
    "one": ("m", (1, 0, 0)),  # nothing to train on
}
Users = dict[str, tuple[str, tuple[int, int, int]]]


def write(root: Path, users: Users) -> Path:
    root.mkdir(exist_ok=True)
    items = sorted({item for history, _ in users.values() for item in history.split()})
    (root / "items.tsv").write_text("".join(f"{item}\ttitle of {item}\n" for item in items))
    (root / "users.tsv").write_text("".join(f"{user}\t{history}\n" for user, (history, _) in users.items()))
    lines = (f"{user}\t{' '.join(map(str, parts))}\n" for user, (_, parts) in users.items())
    (root / "splits.tsv").write_text("".join(lines))
    return root


def letters(sequences: Sequences, items: np.ndarray) -> str:
    return "".join(sequences.item_ids[item - 1] for item in items)


def targets_of(sequences: Sequences, name: str) -> dict[str, tuple[str, str]]:
    """Return each user's history and targets of a split."""
    split = sequences.split(name)
    rows = {}
    for row, user in enumerate(split.users):
        history = split.items[split.ends[row] - split.lengths[row] : split.ends[row]]
        before = rows.setdefault(sequences.user_ids[user], (letters(sequences, history), ""))
        assert before[0] == letters(sequences, history)
        rows[sequences.user_ids[user]] = before[0], before[1] + letters(sequences, split.targets[[row]])
    return rows


@pytest.fixture
def by_hand(tmp_path) -> Path:
    return write(tmp_path / "by-hand", BY_HAND)


def test_by_hand(by_hand, caplog):
    with caplog.at_level(logging.WARNING):
        sequences = load_dataset(by_hand, GIVEN).sequences
    assert "4 targets have no interaction before them and are left out: 4 of validation" not in caplog.text
    assert "5 targets have no interaction before them and are left out: 4 of validation, 1 of test" in caplog.text
    assert sequences.user_ids == ["whole", "repeated", "trained", "validated", "late"]
    assert "".join(sequences.item_ids) == "abcdefgjk"
    parts = np.split(sequences.items, sequences.offsets[1:-1])
    assert [letters(sequences, part) for part in parts] == ["bcdefg", "bcffgcf", "ab", "ab", "jkb"]  # "a" is cut off
    assert letters(sequences, sequences.training[1]) == "bcdbcaba"
    assert sequences.training_users.tolist() == [0, 1, 2] and sequences.epoch_interactions == 7
    assert targets_of(sequences, "validation") == {
        "whole": ("bcd", "e"), "repeated": ("bc", "f"), "validated": ("a", "b")
    }  # fmt: skip
    assert targets_of(sequences, "test") == {"whole": ("bcde", "fg"), "repeated": ("bcf", "fgc"), "late": ("jk", "b")}
    test = sequences.split("test")
    assert test.users.tolist() == [0, 0, 1, 1, 1, 4] and test.first_rows.tolist() == [0, 2, 5]
    assert letters(sequences, test.inputs[0]) == "de" and test.reachable.tolist() == [1, 1, 0, 1, 0, 1]
    assert sequences.split("validation").repeated_users is None and test.repeated_users is test.users
    counts = statistics(sequences)
    assert (counts["users"], counts["training_users"], counts["training_interactions"]) == (5, 3, 8)
    assert (counts["validation_targets"], counts["test_targets"], counts["test_users"]) == (3, 6, 3)
    assert "validation_users" not in counts and counts["targets_without_history"] == 5
    assert counts["unreachable_targets_share"] == pytest.approx(2 / 6)


def test_saved_histories_are_read_again(by_hand, tmp_path):
    sequences = load_dataset(by_hand, GIVEN).sequences
    sequences.save(tmp_path / "s.npz")
    loaded = load_sequences(tmp_path / "s.npz")
    for name in ("validation", "test"):
        assert targets_of(loaded, name) == targets_of(sequences, name)
        assert loaded.target_counts[name].tolist() == sequences.target_counts[name].tolist()
    assert loaded.without_history == {"validation": 4, "test": 1}
    reversed_users = with_reversed_users(loaded)
    assert not len(reversed_users.split("test").users) and reversed_users.epoch_interactions == 14


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("test", [2, 3, 0, 0, 1]),  # more than the history has
        ("test", [2, 4, 1, 0, 1]),  # a user without a target
        ("test", [0, 4, 0, 0, 1]),
        ("validation", [1, 1, 0, 1]),
    ],
)
def test_saved_counts_that_do_not_fit_are_refused(by_hand, tmp_path, name, counts):
    sequences = load_dataset(by_hand, GIVEN).sequences
    changed = {**sequences.target_counts, name: np.array(counts)}
    if counts == [2, 3, 0, 0, 1]:
        changed[name] = sequences.target_counts[name] + (np.arange(5) == 4)
    dataclasses.replace(sequences, target_counts=changed).save(tmp_path / "s.npz")
    with pytest.raises(InputError, match=f"array {name}_target_counts has numbers that do not fit"):
        load_sequences(tmp_path / "s.npz")


def test_a_file_without_one_of_the_counts_is_refused(by_hand, tmp_path):
    path = tmp_path / "s.npz"
    load_dataset(by_hand, GIVEN).sequences.save(path)
    for lost in ("validation_target_counts", "test_without_history", "test_targets"):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name not in (lost, "checksums")}
        np.savez_compressed(tmp_path / "lost.npz", **arrays)
        with pytest.raises(InputError, match=f"array {lost} is missing"):
            load_sequences(tmp_path / "lost.npz")


def test_one_target_a_user_is_saved_as_before(tmp_path):
    root = write(tmp_path / "d", {"u": ("a b c d", (2, 1, 1)), "v": ("a b c d", (3, 0, 1))})
    load_dataset(root, GIVEN).sequences.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert not [name for name in file.files if "counts" in name or "without" in name]


def reference(users: Users, max_inputs: int) -> dict[str, tuple[str, dict[str, tuple[str, str]]]]:
    """Return each kept user's training part, and the history and the targets of both splits, one user at a time."""
    kept_users = {}
    for user, (history, (training, validation, _)) in users.items():
        items = history.split()
        trained = items[:training][-(max_inputs + 1) :]
        between = items[training : training + validation]
        histories = {
            "validation": (trained, between),
            "test": (trained + between, items[training + validation :]),
        }
        targets = {
            name: ("".join(before), "".join(dict.fromkeys(after)))
            for name, (before, after) in histories.items()
            if before and after
        }
        if targets or len(trained) >= 2:
            kept_users[user] = "".join(trained), targets
    return kept_users


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 10**6)).filter(
            lambda user: sum(user[:3])
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 4),
    st.booleans(),
)
def test_any_split_agrees_with_a_slow_reference(tmp_path_factory, users, max_inputs, by_polars):
    whole = {"whole": ("a b c d", (2, 1, 1))}
    for number, (*parts, seed) in enumerate(users):
        drawn = np.random.default_rng(seed).choice(list("abcdefgh"), sum(parts))
        whole[f"u{number}"] = " ".join(drawn), tuple(parts)
    root = write(tmp_path_factory.mktemp("given"), whole)
    with pytest.MonkeyPatch.context() as patch:
        if by_polars:
            patch.setattr(fast_tables, "LEAST_BYTES", 0)
            patch.setattr(given_split, "_read_strictly", lambda *_: pytest.fail("splits.tsv was read line by line"))
        sequences = load_dataset(root, ProtocolConfig(split="given", max_inputs=max_inputs)).sequences
    expected = reference(whole, max_inputs)
    offsets, trained = sequences.training
    assert sequences.user_ids == list(expected)
    assert [letters(sequences, part) for part in np.split(trained, offsets[1:-1])] == [
        part for part, _ in expected.values()
    ]
    for name in ("validation", "test"):
        assert targets_of(sequences, name) == {
            user: targets[name] for user, (_, targets) in expected.items() if name in targets
        }


WHOLE: Users = {"u": ("a b c d", (2, 1, 1)), "v": ("a b c d", (3, 0, 1))}
NUMBERS = "expected three whole numbers, the interactions in training, validation and test, one space between, found"
VALIDATION = (
    "the best checkpoint is chosen by them; hold out interactions for validation and import again, or train by "
)
TEST = "the best checkpoint is tested by them; hold out interactions for test and import again, or train by "
BAD_FILES = {  # the message after "splits.tsv"
    "u\t2 1 1\n": ": ends before user 'v'; expected the users of users.tsv in their order",
    "v\t3 0 1\nu\t2 1 1\n": " line 1: expected user 'u', as in users.tsv, found user 'v'",
    "u\t2 1 1\nv\t3 0 1\nw\t1 1 1\n": " line 3: expected the end of the file, as in users.tsv, found user 'w'",
    "u\t2 1 1\nv\t3 1 1\n": " line 2: expected counts of the 4 interactions in users.tsv, found 3 + 1 + 1 = 5",
    "u\t2 1 1\nv\t3 1\n": f" line 2: {NUMBERS} '3 1'",
    "u\t2 1 1\nv\t3 0 1 0\n": f" line 2: {NUMBERS} '3 0 1 0'",
    "u\t5 -2 1\nv\t3 0 1\n": f" line 1: {NUMBERS} '5 -2 1'",
    "u\t2 1.0 1\nv\t3 0 1\n": f" line 1: {NUMBERS} '2 1.0 1'",
    "u\t2 1 1\nv\tall\n": f" line 2: {NUMBERS} 'all'",
    "u\t2  1 1\nv\t3 0 1\n": f" line 1: {NUMBERS} '2  1 1'",
    f"u\t{'9' * 30} 1 1\nv\t3 0 1\n": f" line 1: {NUMBERS} '{'9' * 30} 1 1'",
    "u 2 1 1\nv\t3 0 1\n": " line 1: expected 2 fields separated by tabs, found 1",
    "u\t2 1 1\n\n": " line 2: empty line; expected 2 fields separated by tabs",
    "": ": empty; expected lines of 2 fields separated by tabs",
    "u\t4 0 0\nv\t3 0 1\n": f": expected validation targets, found none; {VALIDATION}another split",
    "u\t0 4 0\nv\t3 0 1\n": ": expected validation targets, found none but 4 without an interaction before them; "
    f"{VALIDATION}another split",
    "u\t2 2 0\nv\t3 1 0\n": f": expected test targets, found none; {TEST}another split",
    "u\t1 2 1\nv\t1 2 1\n": ": expected users with two training interactions or more, found none",
}


@pytest.mark.parametrize("by_polars", [False, True])
@pytest.mark.parametrize("content", BAD_FILES)
def test_a_bad_file_is_refused(tmp_path, monkeypatch, content, by_polars):
    root = write(tmp_path / "bad", WHOLE)
    (root / "splits.tsv").write_text(content)
    if by_polars:
        monkeypatch.setattr(fast_tables, "LEAST_BYTES", 0)
    with pytest.raises(InputError) as error:
        load_dataset(root, GIVEN)
    assert str(error.value) == f"{root / 'splits.tsv'}{BAD_FILES[content]}"


def test_a_missing_file_is_refused(tmp_path):
    root = write(tmp_path / "d", WHOLE)
    (root / "splits.tsv").unlink()
    message = refused("stats", root, "--split", "given")
    assert "splits.tsv: no such file; a given split needs it, and iisan-fast import writes it from a split" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-interactions", "6"), "min_interactions: the split given takes all users of splits.tsv; leave it out"),
        (("--validation-from", "0.5"), "validation_from, test_from: given takes no shares; they are for temporal"),
    ],
)
def test_settings_of_other_splits_are_refused(tmp_path, options, message):
    assert message in refused("stats", write(tmp_path / "d", WHOLE), "--split", "given", *options)


def test_a_given_split_that_is_not_read_is_said(tmp_path, caplog):
    root = write(tmp_path, {"u": ("a b c d e", (3, 1, 1))})
    load_dataset(root, ProtocolConfig(split="leave-one-out"))
    assert (
        f"{root / 'splits.tsv'}: not read, since the split is leave-one-out; choose it with --split given"
        in caplog.text
    )
    caplog.clear()
    load_dataset(root, GIVEN)
    assert "not read" not in caplog.text
