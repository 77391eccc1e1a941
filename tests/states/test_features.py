"""Read ready-made features in every form, and refuse what is no features or leaves a row open."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pl = pytest.importorskip("polars")

from iisan_fast.config import FeaturesConfig
from iisan_fast.errors import InputError
from iisan_fast.states.features import Features

IDS = ["b", "a", "d", "c"]
VALUES = np.arange(24, dtype=np.float32).reshape(4, 2, 3)  # of IDS: two layers of width 3


def read(config: FeaturesConfig, item_ids: list[str]) -> torch.Tensor:
    """Return the features of items, as a run reads them."""
    features = Features.open(config, item_ids)
    view = features.view(config.name)
    features.contents(config.name, item_ids)
    shape = (len(item_ids), len(view["layers"]), view["width"])
    states = torch.empty(shape, dtype=getattr(torch, view["dtype"]))
    features.read(config.name, item_ids, states)
    features.close()
    return states


def refusal(config: FeaturesConfig, item_ids: list[str] = IDS) -> str:
    """Return the one line with which features are refused."""
    with pytest.raises(InputError) as caught:
        read(config, item_ids)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path: Path, array: np.ndarray) -> str:
    """Save an array, and return its path."""
    np.save(path, array, allow_pickle=array.dtype.hasobject)
    return str(path)


# npy


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_layers_of_an_array_with_ids_in_a_text_file(tmp_path, dtype, layers):
    path = saved(tmp_path / "f.npy", VALUES.astype(dtype))
    ids = tmp_path / "ids.txt"
    ids.write_text("b\na\r\nd\nc\n\n")
    states = read(FeaturesConfig("x", path, layers, str(ids)), ["a", "c"])
    assert states.dtype == (torch.float16 if dtype == "float16" else torch.float32)
    assert torch.equal(states.float(), torch.from_numpy(VALUES[[1, 3]][:, list(layers or (0, 1))]))


def test_an_array_of_one_layer_saved_by_columns_with_ids_as_an_array(tmp_path):
    path = saved(tmp_path / "f.npy", np.asfortranarray(VALUES[:, 0]))
    ids = saved(tmp_path / "ids.npy", np.array([7, 5, 11, 3]))
    assert torch.equal(read(FeaturesConfig("x", path, ids=ids), ["11", "7"])[:, 0], torch.from_numpy(VALUES[[2, 0], 0]))
    texts = saved(tmp_path / "texts.npy", np.array(IDS))
    assert torch.equal(read(FeaturesConfig("x", path, ids=texts), ["d"])[:, 0], torch.from_numpy(VALUES[[2], 0]))


@pytest.mark.parametrize(
    ("item_ids", "first_id", "rows"),
    [
        (["2", "0", "1"], None, [2, 0, 1]),  # an item 0
        (["4", "1", "2"], None, [3, 0, 1]),  # the last row is of the largest id
        (["4", "3"], None, [3, 2]),
        (["1", "2"], 0, [1, 2]),
        (["1", "2"], 1, [0, 1]),
    ],
)
def test_whole_numbers_give_the_rows(tmp_path, item_ids, first_id, rows):
    path = saved(tmp_path / "f.npy", VALUES)
    config = FeaturesConfig("x", path, first_id=first_id)
    assert torch.equal(read(config, item_ids), torch.from_numpy(VALUES[rows]))
    assert Features.open(config, item_ids).view("x")["first_id"] == int(item_ids[0]) - rows[0]


def test_a_row_that_is_not_certain_is_asked_for(tmp_path):
    path = saved(tmp_path / "f.npy", VALUES)
    for largest in ("3", "2"):
        line = refusal(FeaturesConfig("x", path), ["1", largest])
        assert f"4 rows without ids, and the item ids are 1 to {largest}; give first_id=0" in line
    for unfit in ("i1", "01", "-1", "1.0", "٣"):
        line = refusal(FeaturesConfig("x", path), ["1", unfit])
        assert f"item id {unfit!r} is no whole number; give ids=FILE" in line
    assert "its 4 rows are the ids 0 to 3" in refusal(FeaturesConfig("x", path), ["0", "4"])
    assert "lacks 1 of 2 items (5)" in refusal(FeaturesConfig("x", path, first_id=1), ["1", "5"])


# safetensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_with_a_tensor_of_ids(tmp_path, dtype):
    path = tmp_path / "f.safetensors"
    save_file({"ids": torch.tensor([3, 1, 2, 9]), "emb": torch.from_numpy(VALUES).to(dtype)}, path)
    states = read(FeaturesConfig("x", str(path)), ["9", "3"])
    assert states.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(states.float(), torch.from_numpy(VALUES[[3, 0]]))


def test_a_named_tensor_with_ids_in_the_metadata(tmp_path):
    path = tmp_path / "f.safetensors"
    tensors = {"image": torch.from_numpy(VALUES), "text": -torch.from_numpy(VALUES[:, 0])}
    save_file(tensors, path, {"ids": json.dumps(IDS)})
    assert torch.equal(read(FeaturesConfig("x", str(path), tensor="text"), ["c"]), -torch.from_numpy(VALUES[3:, :1]))
    assert "found image, text; name it by tensor=NAME" in refusal(FeaturesConfig("x", str(path)))
    assert "has no tensor 'audio', but image, text" in refusal(FeaturesConfig("x", str(path), tensor="audio"))


@pytest.mark.parametrize("layers", [slice(0, 1), slice(0, 2)])
def test_a_tensor_for_each_item(tmp_path, layers):
    path = tmp_path / "f.safetensors"
    values = VALUES[:, 0] if layers.stop == 1 else VALUES
    save_file({item_id: torch.from_numpy(row.copy()) for item_id, row in zip(IDS, values)}, path)
    assert torch.equal(read(FeaturesConfig("x", str(path)), ["d", "b"]), torch.from_numpy(VALUES[[2, 0]][:, layers]))
    assert "lacks 1 of 2 items (e)" in refusal(FeaturesConfig("x", str(path)), ["a", "e"])


def test_tensors_that_do_not_fit_each_other(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, path)
    assert "alike, found F32 [3] of item 'a' and F32 [4] of item 'b'" in refusal(FeaturesConfig("x", str(path)), ["a"])
    save_file({"ids": torch.arange(3), "emb": torch.zeros(4, 2)}, path)
    assert "tensor 'ids': expected an id for each of 4 rows of features, found 3" in refusal(
        FeaturesConfig("x", str(path)), ["0"]
    )
    path.write_bytes(path.read_bytes()[:-4])
    assert "damaged, or no safetensors file" in refusal(FeaturesConfig("x", str(path)), ["0"])


# Parquet


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (VALUES[:, 0].tolist(), pl.List(pl.Float32), VALUES[:, :1]),
        (VALUES[:, 0].tolist(), pl.Array(pl.Float64, 3), VALUES[:, :1]),
        (VALUES.tolist(), pl.List(pl.List(pl.Float32)), VALUES),
    ],
)
def test_a_column_of_lists_with_a_column_of_ids(tmp_path, values, kind, expected):
    path = tmp_path / "f.parquet"
    pl.DataFrame({"item_id": IDS, "embedding": values}, {"item_id": pl.String, "embedding": kind}).write_parquet(path)
    states = read(FeaturesConfig("x", str(path)), ["c", "a"])
    assert states.dtype == torch.float32 and torch.equal(states, torch.from_numpy(expected[[3, 1]]))


def test_a_column_for_each_number_in_a_folder_of_files(tmp_path):
    frame = pl.DataFrame({"id": [5, 6, 7, 8], **{f"dim_{n}": VALUES[:, 0, n] for n in range(3)}})
    frame[:3].write_parquet(tmp_path / "part-0.parquet")
    frame[3:].write_parquet(tmp_path / "part-1.parquet")
    assert torch.equal(read(FeaturesConfig("x", str(tmp_path)), ["8", "5"]), torch.from_numpy(VALUES[[3, 0], :1]))


def test_columns_that_are_not_certain_are_asked_for(tmp_path):
    path = tmp_path / "f.parquet"
    columns = {"product_id": IDS, "asin": IDS, "text": VALUES[:, 0].tolist(), "image": VALUES[:, 1].tolist()}
    pl.DataFrame(columns).write_parquet(path)
    line = refusal(FeaturesConfig("x", str(path)))
    assert "found product_id, asin; name it by id_column=NAME" in line
    line = refusal(FeaturesConfig("x", str(path), id_column="asin"))
    assert "found text, image; name it by column=NAME" in line
    config = FeaturesConfig("x", str(path), id_column="asin", column="image")
    assert torch.equal(read(config, ["d"]), torch.from_numpy(VALUES[2:3, 1:]))
    assert "id_column: expected a column of text or whole numbers, found 'text'" in refusal(
        FeaturesConfig("x", str(path), id_column="text")
    )


def test_ids_as_categories(tmp_path):
    path = tmp_path / "f.parquet"
    ids = pl.Series("asin", IDS, pl.Categorical)
    pl.DataFrame([ids, pl.Series("embedding", VALUES[:, 0].tolist())]).write_parquet(path)
    assert torch.equal(read(FeaturesConfig("x", str(path)), ["c", "b"]), torch.from_numpy(VALUES[[3, 0], :1]))


@pytest.mark.parametrize(
    ("lists", "problem"),
    [
        ([[1.0, 2.0], [3.0], [1.0, 2.0], [1.0, 2.0]], "item 'a': expected 2 numbers or lists"),
        (
            [[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]],
            "item 'a': expected 2 numbers or lists, as of the items before, found 0",
        ),
        ([[1.0, 2.0], [1.0, 2.0], [1.0, None], [1.0, 2.0]], "item 'd': a number is missing"),
        ([[], [], [], []], "item 'b': expected one or more numbers"),
    ],
)
def test_lists_of_another_width_and_numbers_that_are_missing(tmp_path, lists, problem):
    path = tmp_path / "f.parquet"
    pl.DataFrame({"item": IDS, "feature": lists}, {"item": pl.String, "feature": pl.List(pl.Float32)}).write_parquet(
        path
    )
    assert problem in refusal(FeaturesConfig("x", str(path)))


def test_parquet_of_several_parts_that_are_unpacked_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("iisan_fast.states.parquet_features.ROWS_AT_ONCE", 3)
    path = tmp_path / "f.parquet"
    pl.DataFrame({"item": IDS, "feature": VALUES.tolist()}).write_parquet(path)
    assert torch.equal(read(FeaturesConfig("x", str(path)), IDS), torch.from_numpy(VALUES))


# What is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_item(tmp_path, value):
    values = VALUES.copy()
    values[2, 1, 0] = value
    path = saved(tmp_path / "f.npy", values)
    line = refusal(FeaturesConfig("x", path, ids=_ids(tmp_path)))
    assert line.startswith(f"{path}: view 'x', item 'd': expected finite numbers, found {value} (layer 1, number 0)")
    assert torch.equal(read(FeaturesConfig("x", path, (0,), _ids(tmp_path)), IDS), torch.from_numpy(VALUES[:, :1]))


def test_a_number_that_float32_cannot_hold(tmp_path):
    path = saved(tmp_path / "f.npy", np.full((4, 2), 1e300))
    assert "item 'b': expected finite numbers, found inf" in refusal(FeaturesConfig("x", path, ids=_ids(tmp_path)))


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([None, {}], dtype=object), "holds objects of Python, which are not read"),
        (np.zeros((4, 2), np.int64), "expected float16, float32, float64, found int64"),
        (np.zeros(4, np.float32), "expected features [rows, width] or [rows, layers, width], found 4"),
        (np.zeros((4, 1, 1, 1), np.float32), "found 4 x 1 x 1 x 1"),
        (np.zeros((4, 0), np.float32), "found 4 x 0"),
        (np.zeros((3, 2), np.float32), "expected an id for each of 3 rows"),
    ],
)
def test_arrays_that_are_no_features(tmp_path, array, problem):
    assert problem in refusal(FeaturesConfig("x", saved(tmp_path / "f.npy", array), ids=_ids(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("f.npy", b"", "expected an array that numpy.save wrote"),
        ("f.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': 'O'", "damaged, or no array of numpy"),
        ("f.pt", b"", "torch.load(FILE, weights_only=True)"),
        ("f.npz", b"", "numpy.load(FILE)[NAME]"),
        ("f.pkl", b"", "it may run code"),
        ("f.csv", b"", "write_parquet"),
        ("f.xyz", b"", "found another name"),
        ("f.parquet", b"no parquet", "cannot be read"),
        ("f.safetensors", b"\xff" * 20, "damaged, or no safetensors file"),
    ],
)
def test_files_of_another_kind(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    assert problem in refusal(FeaturesConfig("x", str(tmp_path / name)))


def test_a_shortened_and_a_missing_file(tmp_path):
    path = Path(saved(tmp_path / "f.npy", VALUES))
    path.write_bytes(path.read_bytes()[:-8])
    assert "damaged, or no array of numpy" in refusal(FeaturesConfig("x", str(path)))
    assert "none.npy: no such file" in refusal(FeaturesConfig("x", str(tmp_path / "none.npy")))
    (tmp_path / "empty").mkdir()
    assert "expected .parquet files in the folder, found none" in refusal(FeaturesConfig("x", str(tmp_path / "empty")))


def test_missing_and_repeated_ids_and_layers(tmp_path):
    path = saved(tmp_path / "f.npy", VALUES)
    ids = tmp_path / "ids.txt"
    ids.write_text("b\na\nd\nb\n")
    assert "expected each id once, found 'b' in rows 0 and 3" in refusal(FeaturesConfig("x", path, ids=str(ids)))
    line = refusal(FeaturesConfig("x", path, ids=_ids(tmp_path)), [f"i{n}" for n in range(5)])
    assert "lacks 5 of 5 items (i0, i1, i2 and 2 more); its ids are like b, a, d and 1 more" in line
    assert "layers: expected numbers from 0 to 1, found 2" in refusal(FeaturesConfig("x", path, (0, 2), _ids(tmp_path)))
    ids.write_text("b\ta\n\nc\n")
    assert "ids.txt line 1: expected an item id, found a tab" in refusal(FeaturesConfig("x", path, ids=str(ids)))
    assert "column: is for .parquet files" in refusal(FeaturesConfig("x", path, column="c"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"layers": ()}, "layers: expected ascending numbers from 0, found none"),
        ({"layers": (2, 1)}, "found 2,1"),
        ({"layers": (-1,)}, "found -1"),
        ({"ids": "i", "first_id": 0}, "ids, first_id: both say which row an item has"),
        ({"first_id": 2}, "first_id: expected 0 to 1, found 2"),
        ({"path": ""}, "path: expected a file, found ''"),
        ({"name": ""}, "name: expected a view's name"),
    ],
)
def test_settings_that_cannot_be(settings, problem):
    with pytest.raises(InputError) as caught:
        FeaturesConfig(**{"name": "x", "path": "f.npy", **settings})
    assert problem in str(caught.value)


def test_pages_of_the_file_are_given_back_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("iisan_fast.states.features.MOST_MAPPED", 1)
    path = saved(tmp_path / "f.npy", VALUES)
    config = FeaturesConfig("x", path, ids=_ids(tmp_path))
    assert torch.equal(read(config, IDS), torch.from_numpy(VALUES))


def _ids(folder: Path) -> str:
    """Write IDS into a text file, and return its path."""
    path = folder / "ids-of-rows.txt"
    path.write_text("\n".join(IDS))
    return str(path)


def test_lists_in_parquet_without_ids_are_rows_as_those_of_an_array(tmp_path):
    values = np.arange(6, dtype="float32").reshape(3, 2)
    path = tmp_path / "lists.parquet"
    pl.DataFrame({"emb": values.tolist()}).write_parquet(path)
    (tmp_path / "ids.txt").write_text("c\na\nb\n")
    named = FeaturesConfig("v", str(path), ids=str(tmp_path / "ids.txt"))
    assert read(named, ["a", "b", "c"])[:, 0].tolist() == values[[1, 2, 0]].tolist()
    assert read(FeaturesConfig("v", str(path)), ["2", "0"])[:, 0].tolist() == values[[2, 0]].tolist()
    assert "its rows have no ids, and item id 'a' is no whole number" in refusal(FeaturesConfig("v", str(path)), ["a"])
    pl.DataFrame({"emb": [[1.0], None]}).write_parquet(path)
    assert "row 1: expected 1 numbers or lists" in refusal(FeaturesConfig("v", str(path)), ["0"])


def test_a_tensor_of_whole_numbers_is_no_features(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file({"x": torch.ones(2, 3, dtype=torch.int32)}, path)
    assert "expected a tensor of features of F16, F32, F64, BF16, found x of I32; convert it" in refusal(
        FeaturesConfig("v", str(path)), ["0", "1"]
    )
