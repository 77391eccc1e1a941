"""The co-occurrence matrix and its sums over histories, beside dense arrays that are filled pair by pair."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import histories_at_random, make_sequences
from iisan_fast.config import ProtocolConfig
from iisan_fast.data.sequences import Sequences, load_dataset
from iisan_fast.models.cooccurrence import CoOccurrence

ALL = 1_000_000  # neighbours: no item is cut


def dense(matrix: CoOccurrence) -> np.ndarray:
    """Return the matrix as a dense array. Each entry must stand once, in ascending order."""
    items = len(matrix.offsets) - 1
    full = np.zeros((items, items), dtype=np.float32)
    for row in range(items):
        columns = matrix.items[matrix.offsets[row] : matrix.offsets[row + 1]]
        assert (np.diff(columns) > 0).all()
        full[row, columns] = matrix.values[matrix.offsets[row] : matrix.offsets[row + 1]]
    return full


def by_formula(histories: list[list[int]], items: int) -> np.ndarray:
    """Return the whole matrix of training histories, float64 [items, items], from its definition."""
    weights = np.zeros((items, items))
    for history in histories:
        for earlier in range(len(history)):
            for later in range(earlier + 1, min(earlier + 10, len(history))):
                i, j, k = history[earlier] - 1, history[later] - 1, later - earlier
                if i != j:
                    weights[i, j] += 1 / k
                    weights[j, i] += 0.6 / k
    return weights / np.maximum(1, np.sqrt(weights.sum(axis=1, keepdims=True)))


def equal_bits(left: CoOccurrence, right: CoOccurrence) -> bool:
    """Return True if two matrices are equal bit for bit."""
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("offsets", "items", "values"))


def training(histories: list[list[int]], items: int) -> Sequences:
    """Return sequences whose training histories are those given: two held-out items of the first follow each."""
    return make_sequences([[*history, 1, 1] for history in histories], items=items)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=14), min_size=1, max_size=6))
def test_the_matrix_follows_its_formula(histories):
    matrix = CoOccurrence.of(training(histories, 6), ALL)
    assert (matrix.offsets.dtype, matrix.items.dtype, matrix.values.dtype) == (np.int64, np.int32, np.float32)
    np.testing.assert_allclose(dense(matrix), by_formula(histories, 6), rtol=1e-6)
    assert (matrix.values > 0).all()


@pytest.mark.parametrize("block_bytes", [700, 2000, 30_000])
@pytest.mark.parametrize("neighbours", [3, ALL])
def test_blocks_of_any_size_give_the_same_bits(block_bytes, neighbours):
    histories = histories_at_random(200, 30) + [[7, 8] * 20] * 5  # items 7 and 8 alone fill many blocks
    sequences = make_sequences(histories, items=31)  # nobody takes item 31
    whole = CoOccurrence.of(sequences, neighbours)
    assert equal_bits(CoOccurrence.of(sequences, neighbours, block_bytes), whole)
    assert whole.offsets[-1] == whole.offsets[-2] and len(whole.values) > 60


def test_the_strongest_neighbours_remain_and_of_equal_ones_the_first():
    histories = [[1, 2], [1, 3], [1, 4], [1, 5], [1, 4], [1, 6], [6, 1]]
    matrix = CoOccurrence.of(training(histories, 6), 3)
    whole = by_formula(histories, 6)
    assert matrix.items[: matrix.offsets[1]].tolist() == [1, 3, 5]  # items 4 and 6, then 2 of the equal 2, 3 and 5
    np.testing.assert_allclose(matrix.values[: matrix.offsets[1]], whole[0, [1, 3, 5]], rtol=1e-6)  # by the whole sum


def test_only_training_pairs_count():
    held_out = make_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 5, 4]], items=5)
    assert set(CoOccurrence.of(held_out, ALL).items.tolist()) == {0, 1, 2}
    # A temporal split: the second user's training ends after one item, and what follows is no pair.
    temporal = dataclasses.replace(
        held_out,
        training_ends=np.array([3, 6]),
        targets={"validation": np.array([3, 6]), "test": np.array([4, -1])},
    )
    expected = by_formula([[1, 2, 3]], 5)
    np.testing.assert_allclose(dense(CoOccurrence.of(temporal, ALL)), expected, rtol=1e-6)


def test_a_pair_after_the_first_moment_of_a_temporal_split_is_not_counted(tmp_path):
    times = {"u1": "1 2 3 4 90", "u2": "1 2 3 4 5", "u3": "80 81 82 83 84", "u4": "60 61 95 96 97"}
    taken = {"u1": "a b c d e", "u2": "b c d a b", "u3": "x y x y x", "u4": "x a y b e"}
    (tmp_path / "items.tsv").write_text("".join(f"{item}\ttitle\n" for item in "abcdexy"))
    (tmp_path / "users.tsv").write_text("".join(f"{user}\t{items}\n" for user, items in taken.items()))
    (tmp_path / "times.tsv").write_text("".join(f"{user}\t{moments}\n" for user, moments in times.items()))
    protocol = ProtocolConfig(split="temporal", validation_from=0.5, test_from=0.8)
    sequences = load_dataset(tmp_path, protocol).sequences
    matrix = dense(CoOccurrence.of(sequences, ALL))
    number = {item_id: position for position, item_id in enumerate(sequences.item_ids)}
    later = [number["e"], number["x"], number["y"]]  # taken beside others from time 60 on
    assert not matrix[later].any() and not matrix[:, later].any()
    assert matrix[number["a"], number["b"]] > 0 and matrix[number["c"], number["d"]] > 0


def test_sums_follow_their_formula():
    """Repeated items count each time, padding and unknown items have no neighbours, and an empty history sums to 0."""
    histories = histories_at_random(80, 12)
    matrix = CoOccurrence.of(make_sequences(histories, items=12), 5)
    queries = np.array([[0, 0, 0, 0], [0, 0, 0, 5], [3, 3, 0, 3], [1, 2, 3, 99], [12, 4, 4, 1]])
    sums = matrix.sums(queries)
    full = dense(matrix).astype(np.float64)
    expected = np.zeros((len(queries), 12))
    for row, history in enumerate(queries):
        for age, item in enumerate(history[::-1]):
            if 0 < item <= 12:
                expected[row] += 0.7**age * full[item - 1]
    assert sums.dtype == np.float32 and sums.shape == (5, 12)
    np.testing.assert_allclose(sums.toarray(), expected, rtol=1e-5)
    for start, end in zip(sums.indptr, sums.indptr[1:]):
        assert (np.diff(sums.indices[start:end]) > 0).all()


def test_items_with_equal_columns_have_equal_sums():
    histories = [[1, 2, 5, 6, 3, 4], [5, 2, 1, 6, 4, 3], [2, 6, 1, 5], [2, 6, 5, 1]] * 3
    matrix = CoOccurrence.of(training(histories, 6), ALL)
    columns = dense(matrix)
    np.testing.assert_array_equal(columns[[1, 5], 0], columns[[1, 5], 4])
    sums = matrix.sums(np.array([[2, 6, 2, 6, 6], [6, 0, 2, 2, 6]])).toarray()
    np.testing.assert_array_equal(sums[:, 0], sums[:, 4])


def test_items_too_old_to_count_in_float32_are_left_out():
    matrix = CoOccurrence.of(training([[1, 2], [3, 4]], 4), ALL)
    old = np.array([[1] + [3] * 60])
    assert matrix.sums(old).toarray()[0, 1] == 0
    assert matrix.sums(old[:, :40]).toarray()[0, 1] > 0


def test_one_item_and_no_pair():
    matrix = CoOccurrence.of(training([[1, 1, 1]], 1), 200)
    assert len(matrix.values) == 0 and matrix.offsets.tolist() == [0, 0]
    assert matrix.sums(np.array([[1, 1]])).nnz == 0


def test_scientific_has_the_entries_of_its_pairs(scientific):
    whole = CoOccurrence.of(scientific, ALL)
    offsets, items = scientific.training
    pairs = set()
    for start, end in zip(offsets, offsets[1:]):
        history = items[start:end].tolist()
        for place, item in enumerate(history):
            pairs.update((item, later) for later in history[place + 1 : place + 10] if later != item)
    pairs |= {(later, item) for item, later in pairs}
    assert len(whole.values) == len(pairs) == 242_656
    bounded = CoOccurrence.of(scientific, 200)
    assert np.diff(bounded.offsets).max() == 200 and len(bounded.values) == 233_971
