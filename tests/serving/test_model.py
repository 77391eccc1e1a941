"""The class IISAN: fit does what extract and train do, and recommend what the scores of the loaded run say."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import iisan_fast
from helpers.run_folders import untimed
from iisan_fast import IISAN, Dataset, InputError

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")
pyarrow = pytest.importorskip("pyarrow")

SMALL = {"epochs": 2, "batch_users": 16, "embedding_dim": 16, "bottleneck": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def model(toy_run, tmp_path_factory) -> IISAN:
    dataset, cache = toy_run
    return IISAN(cache=cache, **SMALL).fit(dataset, out=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def dense_scores(model) -> np.ndarray:
    """Return the scores of all users' whole histories for all items, by the function `load`."""
    best = iisan_fast.load(model.run, device="cpu")
    return (best.user_states("test") @ best.item_vectors.T).numpy()


def histories_of(run: Path) -> list[list[str]]:
    """Return the inputs of the test users, oldest first: all items but the last."""
    sequences = iisan_fast.load(run, device="cpu").sequences
    parts = np.split(sequences.items, sequences.offsets[1:-1])
    return [[sequences.item_ids[item - 1] for item in part[:-1]] for part in parts]


def test_fit_makes_the_run_that_train_makes(model, toy_run, tmp_path):
    dataset, cache = toy_run
    result = iisan_fast.train(dataset, cache=cache, out=tmp_path / "run", **SMALL)
    assert untimed(model.run) == untimed(tmp_path / "run")
    assert (model.run / "config.json").read_text() == (tmp_path / "run" / "config.json").read_text()
    assert {"run": str(tmp_path / "run"), **model.figures} == result


def test_recommend_ranks_by_the_scores_of_the_run(model, dense_scores):
    histories = histories_of(model.run)
    item_ids = iisan_fast.load(model.run, device="cpu").item_ids
    lists = model.recommend(histories, k=5)
    for history, scores, ranked in zip(histories, dense_scores, lists, strict=True):
        scores = scores.copy()
        scores[[item_ids.index(item_id) for item_id in history]] = -np.inf
        expected = np.argsort(-scores, kind="stable")[:5]
        assert [entry.item_id for entry in ranked] == [item_ids[row] for row in expected]
        np.testing.assert_allclose([entry.score for entry in ranked], scores[expected], rtol=1e-5)
        assert [entry.title for entry in ranked] == [f"title of {item_ids[row]}" for row in expected]


def test_recommend_with_history_allowed_and_denied_items(model, dense_scores):
    history = histories_of(model.run)[0]
    item_ids = iisan_fast.load(model.run, device="cpu").item_ids
    (everything,) = model.recommend([history], k=40, exclude_history=False)
    assert [entry.item_id for entry in everything] == [item_ids[row] for row in np.argsort(-dense_scores[0])]
    (allowed,) = model.recommend([history], k=10, allow=["i3", "i7", *history[:1]])
    assert {entry.item_id for entry in allowed} == {"i3", "i7"} - {*history}
    (without,) = model.recommend([history], k=3, exclude_history=False, deny=[everything[0].item_id])
    assert [entry.item_id for entry in without] == [entry.item_id for entry in everything[1:4]]


def test_lists_by_user_come_back_by_user(model):
    histories = {"anna": ["i1", "i4"], "bert": ["i2"]}
    assert model.recommend(histories, k=3) == dict(zip(histories, model.recommend(list(histories.values()), k=3)))


FRAMES = {
    "pandas": (lambda columns: pandas.DataFrame(columns), lambda frame: frame.to_dict("list")),
    "polars": (lambda columns: polars.DataFrame(columns), lambda frame: frame.to_dict(as_series=False)),
    "arrow": (lambda columns: pyarrow.table(columns), lambda frame: frame.to_pydict()),
}


@pytest.mark.parametrize("library", FRAMES)
def test_a_frame_gives_a_frame_of_its_library(model, library):
    make, columns_of = FRAMES[library]
    lists = model.recommend({"007": ["i1", "i4"], "anna": [], "8": ["i9"]}, k=3)
    frame = model.recommend(make({"user_id": ["007", "anna", "8"], "history": ["i1 i4", "", "i9"]}), k=3)
    assert type(frame) is type(make({}))
    expected = {
        "user_id": [user_id for user_id in lists for _ in range(3)],
        "rank": [1, 2, 3] * 3,
        "item_id": [entry.item_id for ranked in lists.values() for entry in ranked],
        "score": [entry.score for ranked in lists.values() for entry in ranked],
    }
    assert columns_of(frame) == expected
    assert columns_of(model.recommend([["i1", "i4"]], k=2, frame=library))["rank"] == [1, 2]
    rows = make({"user_id": ["007", "007", "8"], "item_id": ["i1", "i4", "i9"]})
    assert columns_of(model.recommend(rows, k=3))["item_id"] == expected["item_id"][:3] + expected["item_id"][6:]


def test_similar_items_are_the_nearest_by_cosine(model):
    best = iisan_fast.load(model.run, device="cpu")
    vectors = best.item_vectors.numpy()
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = directions @ directions[best.item_ids.index("i7")]
    expected = [row for row in np.argsort(-cosines, kind="stable") if best.item_ids[row] != "i7"][:6]
    similar = model.similar("i7", k=6)
    assert [entry.item_id for entry in similar] == [best.item_ids[row] for row in expected]
    np.testing.assert_allclose([entry.score for entry in similar], cosines[expected], rtol=1e-5)
    with pytest.raises(InputError, match="item_id: expected ids of the run's 40 items"):
        model.similar("x")


def test_dicts_give_dicts_and_fewer_items_fewer_rows(model):
    records = model.recommend([{"user_id": "u", "history": ["i1"]}], k=5, allow=["i1", "i2", "i3"])
    (ranked,) = model.recommend([["i1"]], k=2, allow=["i2", "i3"])
    expected = [{"user_id": "u", "rank": n, "item_id": e.item_id, "score": e.score} for n, e in enumerate(ranked, 1)]
    assert records == expected


def test_evaluate_gives_the_figures_of_the_run(model):
    assert model.evaluate()["test"] == model.figures["test"]
    assert "hr@5" in model.evaluate("validation", ks=(5,))["validation"]["masked"]
    with pytest.raises(InputError, match="unknown setting kss; did you mean ks"):
        model.evaluate(kss=(5,))


def test_show_and_export_are_those_of_the_commands(model, tmp_path, monkeypatch):
    page = model.show(tmp_path / "page.html", users=3, pictures=False)
    assert page == tmp_path / "page.html" and "<html" in page.read_text()[:300]
    monkeypatch.setattr("iisan_fast.serving.exports.exporting.export", lambda *arguments: arguments)
    assert model.export(tmp_path / "new" / "exported", "faiss") == (
        model.run,
        tmp_path / "new" / "exported",
        "faiss",
        torch.device("cpu"),
    )


def test_a_missing_library_names_the_command_that_installs_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="frame: pandas is not installed; pip install pandas"):
        model.recommend([["i1"]], frame="pandas")
    with pytest.raises(InputError, match="frame: expected one of polars, pandas, arrow, found 'dask'"):
        model.recommend([["i1"]], frame="dask")


def test_an_empty_history_gets_popular_items(model):
    counts = iisan_fast.load(model.run, device="cpu").sequences.training_counts[1:]
    (popular,) = model.recommend([[]], k=4)
    expected = np.argsort(-counts, kind="stable")[:4]
    assert [entry.item_id for entry in popular] == [f"i{row + 1}" for row in expected]


def test_unknown_items_are_refused_or_left_out_with_a_warning(model, caplog):
    with pytest.raises(InputError, match=r"histories: .* found 4 unknown \(x, y, z and 1 more\)"):
        model.recommend([["i1", "x", "y"], ["z", "q", "x"]])
    with caplog.at_level(logging.WARNING, "iisan_fast"):
        lists = model.recommend([["i1", "x", "i4"]], k=3, unknown="skip")
    assert lists == model.recommend([["i1", "i4"]], k=3)
    assert "found 1 unknown (x); they are left out" in caplog.text


def test_a_loaded_model_recommends_the_same(model):
    loaded = IISAN.load(str(model.run), device="cpu")
    assert loaded.figures == model.figures
    histories = histories_of(model.run)
    assert loaded.recommend(histories) == model.recommend(histories)
    with pytest.raises(InputError, match="fit: this model is loaded from"):
        loaded.fit("DATASET")


@pytest.mark.slow
def test_fit_encodes_what_is_not_cached(small_catalogue, encoder_views, tmp_path, monkeypatch):
    image, title = encoder_views
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = IISAN(text=title.encoder, image=Path(image.encoder), text_layers=[0, 3, 6], **SMALL)
    model.fit(small_catalogue, out=tmp_path / "first", dtype="float32")
    (states,) = (tmp_path / "cache" / "iisan-fast" / "states").iterdir()
    views = json.loads((model.run / "views.json").read_text())
    assert list(views) == ["image", "title"] and views["title"]["layers"] == [0, 3, 6]
    assert {view["dtype"] for view in views.values()} == {"float32"}
    assert json.loads((model.run / "config.json").read_text())["model"]["method"] == "iisan-versa"  # 4 and 3 layers
    written = (states / "states.lmdb").stat().st_mtime_ns
    lines: list[dict] = []
    model.fit(small_catalogue, out=tmp_path / "second", dtype="float32", seed=1, on_epoch=lines.append)
    assert (states / "states.lmdb").stat().st_mtime_ns == written and len(lines) == 2
    assert model.run == tmp_path / "second" and untimed(model.run) != untimed(tmp_path / "first")


def test_fit_takes_a_dataset_of_frames_and_goes_on_from_a_run(toy_run, tmp_path):
    lines = [line.split("\t") for line in (toy_run[0] / "users.tsv").read_text().splitlines()]
    pairs = [(user_id, item_id) for user_id, history in lines for item_id in history.split()]
    interactions = pandas.DataFrame(pairs, columns=["user_id", "item_id"])
    titles = [line.split("\t") for line in (toy_run[0] / "items.tsv").read_text().splitlines()]
    items = polars.DataFrame(titles, schema=["item_id", "title"], orient="row")
    data = Dataset.from_frames(interactions, items, folder=tmp_path / "dataset")
    settings = {"method": "id", **{name: value for name, value in SMALL.items() if name != "bottleneck"}}
    first = IISAN(**settings).fit(data, out=tmp_path / "first")
    second = IISAN(**settings).fit(data, out=tmp_path / "second", init=first.run)
    losses = [untimed(model.run)[0]["loss"] for model in (first, second)]
    assert losses[1] < losses[0]
    assert second.recommend([["i1", "i4"]], k=1)[0][0].title.startswith("title of i")


NEW = [{"item_id": "007", "title": "velora oak"}, {"item_id": "new", "title": "nordhus glass clay"}]
TITLED = {**SMALL, "method": "iisan-versa", "standardise": True, "similarity": 2.0}


@pytest.fixture(scope="module")
def titled(small_catalogue, encoder_views, tmp_path_factory) -> IISAN:
    """Return a model of titles alone, with standardised states and a weight of similarity."""
    root = tmp_path_factory.mktemp("titled")
    return IISAN(text=encoder_views[1].encoder, cache=root / "states", **TITLED).fit(small_catalogue, root / "run")


@pytest.mark.slow
def test_the_catalogue_grows_and_shrinks_with_the_run(titled, tmp_path):
    run = shutil.copytree(titled.run, tmp_path / "run")
    model = IISAN.load(run, device="cpu")
    before = model.recommend([["i1", "i4"]], k=20)
    model.add_items(NEW)
    (ranked,) = model.recommend([["007", "i4"]], k=5, allow=["new", "i9"])
    assert {(entry.item_id, entry.title) for entry in ranked} >= {("new", "nordhus glass clay")}
    with pytest.raises(InputError, match=r"found 2 that the catalogue has already \(007, new\)"):
        model.add_items(pandas.DataFrame(NEW))
    model.update_items([{"item_id": "new", "title": "velora oak"}])
    (updated,) = model.recommend([["i1"]], k=2, allow=["007", "new"])
    assert updated[0].score == updated[1].score and {entry.title for entry in updated} == {"velora oak"}
    assert IISAN.load(run, device="cpu").recommend([["007"]], k=20) == model.recommend([["007"]], k=20)
    model.remove_items(["007", "new"])
    assert model.recommend([["i1", "i4"]], k=20) == before
    with pytest.raises(InputError, match="items: expected a list of item ids"):
        model.remove_items("i1")


@pytest.mark.slow
def test_a_published_model_grows_by_encoders_that_have_moved(titled, encoder_views, tmp_path, monkeypatch):
    changed = shutil.copytree(titled.run, tmp_path / "run")
    original = IISAN.load(changed, device="cpu")
    original.add_items(NEW[:1])
    original.save_pretrained(tmp_path / "model")
    content = b"".join(path.read_bytes() for path in (tmp_path / "model").iterdir())
    assert b"velora" not in content and b"007" in content
    with pytest.raises(InputError, match="text"):
        IISAN.from_pretrained(tmp_path / "model", device="cpu").add_items(NEW[1:])
    fetched = IISAN.from_pretrained(tmp_path / "model", device="cpu", text=encoder_views[1].encoder)
    for model in (original, fetched):
        model.add_items(NEW[1:])
    original.save_pretrained(tmp_path / "again")
    both = [IISAN.from_pretrained(tmp_path / name, device="cpu") for name in ("model", "again")]
    histories = [["i1", "new"], ["007"]]
    assert (
        both[0].recommend(histories, k=20) == both[1].recommend(histories, k=20) == fetched.recommend(histories, k=20)
    )
    monkeypatch.setattr("iisan_fast.serving.publishing.hub.fetched_run", lambda name, **options: tmp_path / "model")
    with pytest.raises(InputError, match="lies in the cache of the hub"):
        IISAN.from_pretrained("ann/shop", device="cpu", text=encoder_views[1].encoder).remove_items(["i1"])


MISTAKES = {
    "IISAN: unknown setting epoch; did you mean epochs": {"epoch": 3},
    "IISAN: unknown setting text_encoder; did you mean text_": {"text_encoder": "t"},
    "text_pooling: needs text_encoder": {"text_pooling": "cls"},
    "text_source: expected one of title, caption": {"text": "t", "text_source": "body"},
    "text: expected a path, found 3": {"text": 3},
    "device: expected auto, cpu": {"device": "gpu"},
    "IISAN: expected an encoder, found none; give text or image": {},
    "method: expected one of iisan, ": {"text": "t", "method": "ian"},
    "embedding_dim: expected a multiple": {"text": "t", "embedding_dim": 3},
    "no such folder": {"text": "t", "data": "nowhere"},
    "out: expected a path, found 3": {"text": "t", "out": 3},
    "nowhere: not a run folder": {"text": "t", "init": "nowhere"},
    "table: expected one of auto": {"text": "t", "table": "disk"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_one_line_before_an_encoder_runs(toy_run, tmp_path, message):
    arguments = {"data": toy_run[0], "out": tmp_path / "run", **MISTAKES[message]}
    fit = {name: arguments.pop(name) for name in ("data", "out")}
    with pytest.raises(InputError) as error:
        IISAN(**arguments).fit(**fit)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_run_is_refused_before_an_encoder_runs(model, toy_run, tmp_path):
    with pytest.raises(InputError, match="already holds a run"):
        IISAN(text="no-such-encoder", cache=tmp_path / "states").fit(toy_run[0], out=model.run)


def test_mistakes_in_recommend_get_one_line(model):
    with pytest.raises(InputError, match="the model is not fitted yet"):
        IISAN().recommend([["i1"]])
    for message, arguments in (
        ('histories: expected a list of histories, such as [["A", "B"]], found "i1"'.replace('"i1"', "'i1'"), "i1"),
        ('histories[0]: expected a list of item ids, such as ["A", "B"], found \'i1\'', ["i1"]),
        ("histories[0]: expected item ids as text, found 1", [[1]]),
    ):
        with pytest.raises(InputError) as error:
            model.recommend(arguments)
        assert str(error.value) == message
    for message, arguments in (
        ("k: expected a number from 1 to 40", {"k": 41}),
        ("unknown: expected one of error, skip", {"unknown": "keep"}),
        ("allow: expected ids of the run's 40 items, found 1 unknown (x)", {"allow": ["x"]}),
        ("deny: expected ids of the run's 40 items, found 1 unknown (x)", {"deny": ["x"]}),
        ("allow: expected a list of item ids", {"allow": "i1"}),
    ):
        with pytest.raises(InputError) as error:
            model.recommend([["i1"]], **arguments)
        assert message in str(error.value)
