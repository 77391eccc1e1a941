"""A TextArray reads like the list of its texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.data import text_array
from iisan_fast.data.array_files import pack_texts
from iisan_fast.data.text_array import TextArray, first_repeat

LISTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=9)


@given(LISTS, st.integers(-12, 12), st.integers(-12, 12), st.sampled_from([1, 2, -1]))
def test_reads_like_a_list(texts, first, end, step):
    array = TextArray(*pack_texts(texts))
    assert list(array) == texts == array[:] and len(array) == len(texts)
    assert array[first:end:step] == texts[first:end:step]
    if -len(texts) <= first < len(texts):
        assert array[first] == texts[first] and array[np.int64(first)] == texts[first]
    else:
        with pytest.raises(IndexError):
            array[first]
    assert array == texts and array == TextArray(*pack_texts(texts)) and array != [*texts, "x"]
    assert 2 * array == 2 * texts
    assert pack_texts(array)[0] is array.content


@given(LISTS, st.lists(st.integers(0, 8)))
def test_packs_the_texts_of_some_rows(texts, rows):
    rows = [row for row in rows if row < len(texts)]
    content, lengths = TextArray(*pack_texts(texts)).packed(np.array(rows, dtype=np.int64))
    assert content.tobytes().decode() == "".join(texts[row] for row in rows)
    assert lengths.tolist() == [len(texts[row].encode()) for row in rows]


@given(LISTS)
def test_the_first_repeat_is_that_of_a_list(texts):
    seen: dict[str, int] = {}
    expected = next(((i, seen[text]) for i, text in enumerate(texts) if seen.setdefault(text, i) != i), None)
    assert first_repeat(texts) == first_repeat(TextArray(*pack_texts(texts))) == expected


def test_texts_with_equal_hashes_are_compared(monkeypatch):
    monkeypatch.setattr(text_array, "xxh3_64_intdigest", len)
    assert first_repeat(TextArray(*pack_texts(["a", "b", "cc", "d"]))) is None
    assert first_repeat(TextArray(*pack_texts(["a", "b", "cc", "b", "a"]))) == (3, 1)
