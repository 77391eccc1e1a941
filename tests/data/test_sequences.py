"""The data protocol: the paper's counts on real data, the split by hand, and every malformed line refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import make_sequences
from iisan_fast.config import ProtocolConfig
from iisan_fast.data.sequences import load_dataset, statistics
from iisan_fast.errors import InputError


def write_dataset(root: Path, users: str | bytes, items: str = "a\tA\nb\tB\nc\tC\nd\tD\ne\tE &amp; E\nf\tF\n") -> Path:
    root.mkdir(exist_ok=True)
    (root / "items.tsv").write_text(items, encoding="utf-8")
    (root / "users.tsv").write_bytes(users if isinstance(users, bytes) else users.encode())
    return root


def test_scientific_gives_the_papers_counts(scientific):
    counts = statistics(scientific)
    assert (counts["users"], counts["items"], counts["interactions"]) == (12076, 20314, 81711)
    assert counts["training_interactions"] == 57559
    assert counts["cold_targets_share"] == pytest.approx(0.202, abs=5e-4)
    assert counts["unreachable_targets_share"] == pytest.approx(0.051, abs=5e-4)
    assert counts["padding_share"] == pytest.approx(0.57, abs=5e-3)


def test_protocol_by_hand(tmp_path):
    """Short users go, histories are cut to their last 13 before items are counted, order is that of items.tsv."""
    long = "f " + " ".join("abcda" * 3)  # 16 interactions; its first ones, f among them, fall away
    dataset = load_dataset(write_dataset(tmp_path / "d", f"u1\te d c b a\nu2\ta b c d\nu3\t{long}\n"))
    sequences = dataset.sequences
    assert sequences.user_ids == ["u1", "u3"]
    assert sequences.item_ids == ["a", "b", "c", "d", "e"]
    assert dataset.titles == ["A", "B", "C", "D", "E & E"]
    assert sequences.items.tolist() == [5, 4, 3, 2, 1, *([3, 4, 1] + [1, 2, 3, 4, 1] * 2)]
    assert sequences.training[1].tolist() == [5, 4, 3, *([3, 4, 1, 1, 2, 3, 4, 1, 1, 2, 3])]
    assert sequences.popularity.tolist() == [0, *(np.array([4, 2, 4, 3, 1]) / 14)]
    test, validation = sequences.split("test"), sequences.split("validation")
    assert test.targets.tolist() == [1, 1] and validation.targets.tolist() == [2, 4]
    assert validation.inputs.tolist() == [[0] * 7 + [5, 4, 3], [4, 1, 1, 2, 3, 4, 1, 1, 2, 3]]
    assert test.inputs.tolist() == [[0] * 6 + [5, 4, 3, 2], [1, 1, 2, 3, 4, 1, 1, 2, 3, 4]]
    assert test.history.tolist() == [[0] * 8 + [5, 4, 3, 2], [3, 4, 1, 1, 2, 3, 4, 1, 1, 2, 3, 4]]
    assert test.reachable.tolist() == [True, False]


def test_raw_titles_keep_entities(tmp_path):
    root = write_dataset(tmp_path / "d", "u\te d c b a\n")
    assert load_dataset(root, ProtocolConfig(unescape_titles=False)).titles[4] == "E &amp; E"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), min_size=5, max_size=13), min_size=1, max_size=5))
def test_split_equals_slicing_lists(histories):
    sequences = make_sequences(histories, items=8)
    for name, held_out in (("validation", 2), ("test", 1)):
        split = sequences.split(name)
        for user, history in enumerate(histories):
            before = history[:-held_out]
            assert split.targets[user] == history[-held_out]
            assert split.inputs[user].tolist() == ([0] * 10 + before)[-10:]
            assert split.history[user].tolist() == ([0] * 12 + before)[-12:]
            assert split.reachable[user] == (history[-held_out] not in before)


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ("u1\ta b c d e\nu1\ta b c d e\n", "line 2: user 'u1' stands on line 1 already"),
        ("u1\ta b c d zz\n", "line 1: item 'zz' is not in items.tsv"),
        ("u1\ta b  c d e\n", "line 1: an empty item id"),
        ("u1\ta b c d e\n\nu2\ta b c d e\n", "line 2"),
        (f"u1\ta b c d e\n{'u' * 4097}\ta b c d e\n", "line 2: an id of 4,097 bytes; expected at most 4,096"),
        (f"u1\ta b c d {'z' * 9999}\n", f"line 1: item {'z' * 100!r}... is not in items.tsv"),
        ("u1 a b c d e\n", "line 1"),
        ("u1\ta b c\td e\n", "line 1"),
        (b"u1\ta b c d e\nu\xff2\ta b c d e\n", "line 2"),
        ("", "users.tsv"),
        ("u1\ta b c\n", "none of 1 users has the 5 interactions"),
    ],
)
def test_bad_users_file_names_the_line(tmp_path, users, message):
    root = write_dataset(tmp_path / "d", users)
    with pytest.raises(InputError) as error:
        load_dataset(root)
    assert message in str(error.value) and "users.tsv" in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="items.tsv"):
        load_dataset(tmp_path / "empty")


def test_an_id_of_the_longest_length_is_read(tmp_path):
    root = write_dataset(
        tmp_path / "d", f"{'u' * 4096}\te d c b {'a' * 4096}\n", f"{'a' * 4096}\tA\nb\tB\nc\tC\nd\tD\ne\tE\n"
    )
    assert load_dataset(root).sequences.user_ids == ["u" * 4096]
    (root / "items.tsv").write_text(f"b\tB\n{'a' * 20_000_000}\tA\n")
    with pytest.raises(InputError, match=r"items.tsv line 2: an id of 20,000,000 bytes; expected at most 4,096"):
        load_dataset(root)
