"""Recommendations equal a dense sort of full scores, and agree with the ranks by which a run is tested."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from iisan_fast import kernels
from iisan_fast.errors import InputError
from iisan_fast.serving import recommendation
from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.recommendation import Recommended, recommend
from iisan_fast.serving.recommendation_files import json_lines, write_recommendations
from iisan_fast.serving.trained_model import TrainedModel
from iisan_fast.training import load

polars = pytest.importorskip("polars")

CPU = torch.device("cpu")
RUNS = ("plain_run", "run_with_terms", "neighbours_run")
ITEMS = 149


@pytest.fixture(scope="module")
def models(plain_run, run_with_terms, neighbours_run) -> dict[str, TrainedModel]:
    folders = dict(zip(RUNS, (plain_run, run_with_terms, neighbours_run)))
    return {name: TrainedModel.load(folder, CPU) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def model(models) -> TrainedModel:
    return models["run_with_terms"]


def histories_of(lists: list[list[int]]) -> UserHistories:
    """Return histories of item numbers, of users named by their place."""
    offsets = np.cumsum([0, *map(len, lists)])
    return UserHistories([f"u{row}" for row in range(len(lists))], offsets, np.array(sum(lists, []), dtype=np.int64))


def all_of(parts) -> Recommended:
    """Return the recommendations of all parts as one."""
    user_ids, *arrays = zip(*parts)
    return Recommended(sum(user_ids, []), *map(np.concatenate, arrays))


def dense_scores(model: TrainedModel, histories: UserHistories) -> np.ndarray:
    """Return the scores of all items, float64 [R, items]."""
    scores = model.scores(histories)
    dense = (scores.queries.double() @ scores.vectors.double().T).numpy()
    if scores.added is not None:
        added = scores.added(np.arange(len(dense)))
        for user in range(len(dense)):
            here = slice(int(added.offsets[user]), int(added.offsets[user + 1]))
            dense[user, added.items[here].numpy()] += added.values[here].double().numpy()
    return dense


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("exclude", [True, False])
def test_items_are_those_of_a_dense_sort(models, name, exclude):
    model = models[name]
    generator = np.random.default_rng(1)
    histories = histories_of([generator.integers(1, ITEMS + 1, length).tolist() for length in (1, 2, 9, 30, 1)])
    allowed = generator.random(ITEMS) < 0.5
    dense = dense_scores(model, histories)
    for permitted in (None, allowed):
        left_out = np.zeros_like(dense, dtype=bool) if permitted is None else np.tile(~permitted, (len(dense), 1))
        for user in range(len(dense)) if exclude else ():
            left_out[user, histories.part(user, user + 1).items - 1] = True
        expected = np.where(left_out, -np.inf, dense)
        result = all_of(recommend(model, histories, 12, exclude, permitted))
        places = result.items - 1
        chosen = np.take_along_axis(expected, places, axis=1)
        best = np.sort(expected, axis=1)[:, ::-1][:, :12]
        assert np.isfinite(chosen).all() and all(len({*row}) == 12 for row in places.tolist())
        np.testing.assert_allclose(chosen, best, rtol=1e-5, atol=1e-5)  # equal items may change places in float64
        np.testing.assert_allclose(result.scores, best, rtol=1e-5, atol=1e-5)
        equal = result.scores[:, 1:] == result.scores[:, :-1]
        assert (np.diff(places, axis=1)[equal] > 0).all() and not result.by_popularity.any()


@pytest.mark.parametrize("name", RUNS)
def test_targets_stand_at_the_rank_by_which_the_run_was_tested(models, name):
    model = models[name]
    best = load(model.run, CPU)
    split = best.sequences.split("test")
    parts = [split.items[end - length : end].tolist() for end, length in zip(split.ends, split.lengths)]
    scores = best.scores("test")
    added = None if scores.added is None else scores.added(np.arange(len(parts)))
    excluded = torch.from_numpy(split.history - 1)
    targets = torch.from_numpy(split.targets - 1)
    ranks, _ = kernels.target_rank(scores.queries, scores.vectors, targets, excluded, added=added)
    result = all_of(recommend(model, histories_of(parts), ITEMS))
    untied = 0
    for row, (target, rank) in enumerate(zip(split.targets.tolist(), ranks.tolist())):
        place = result.items[row] == target
        if place.any() and (result.scores[row] == result.scores[row][place]).sum() == 1:
            untied += 1
            assert place.nonzero()[0].tolist() == [rank - 1]
        assert place.any() == np.isfinite(rank) == split.reachable[row]
    assert untied > 20


def test_removed_items_count_as_inputs_and_are_never_recommended(model):
    histories = histories_of([[1, 2, 3], [4], []])
    before = all_of(recommend(model, histories, 5))
    is_removed = np.zeros(ITEMS, dtype=bool)
    is_removed[[2, *before.items[0, :2] - 1, before.items[2, 0] - 1]] = True
    smaller = model.with_catalogue(replace(model.catalogue, is_removed=is_removed))
    after = all_of(recommend(smaller, histories, 5))
    assert not is_removed[after.items - 1].any()
    for row in range(3):  # by the scores of before, of which those of the first user have the removed item 3 as input
        remaining = before.items[row][~is_removed[before.items[row] - 1]].tolist()
        assert len(remaining) >= 2 and after.items[row, : len(remaining)].tolist() == remaining
    with pytest.raises(
        InputError, match=f"k: expected a number from 1 to {ITEMS - is_removed.sum()}, .* found {ITEMS}"
    ):
        recommend(smaller, histories, ITEMS)


def test_an_empty_history_gets_the_popular_items_of_equal_ones_the_lower_number(model, caplog):
    result = all_of(recommend(model, histories_of([[], [5], []]), ITEMS))
    counts = model.catalogue.training_counts[1:]
    best = np.lexsort([np.arange(ITEMS), -np.maximum(counts, 0.5)]) + 1
    assert result.by_popularity.tolist() == [True, False, True]
    assert result.items[0].tolist() == result.items[2].tolist() == best.tolist()
    np.testing.assert_allclose(result.scores[0], 0.3 * np.log(np.maximum(counts[best - 1], 0.5)), rtol=1e-6)
    assert "2 of 3 users have no history, and get the most popular items" in caplog.text


def test_fewer_items_than_k_leave_zeros_behind_them(model):
    allowed = np.zeros(ITEMS, dtype=bool)
    allowed[[3, 7, 9]] = True
    result = all_of(recommend(model, histories_of([[4, 8], []]), 5, allowed=allowed))
    assert result.items[0].tolist() == [10, 0, 0, 0, 0] and {*result.items[1, :3]} == {4, 8, 10}
    assert np.isneginf(result.scores[0, 1:]).all() and np.isneginf(result.scores[1, 3:]).all()


def test_parts_give_what_one_part_gives(model, monkeypatch):
    generator = np.random.default_rng(2)
    histories = histories_of([generator.integers(1, ITEMS + 1, length % 7).tolist() for length in range(40)])
    whole = all_of(recommend(model, histories))
    monkeypatch.setattr(recommendation, "USERS_AT_ONCE", 3)
    parts = list(recommend(model, histories))
    assert len(parts) == 14
    assert all_of(parts).user_ids == whole.user_ids
    assert all(map(np.array_equal, all_of(parts)[1:], whole[1:]))


def test_a_long_history_makes_parts_of_few_users():
    histories = histories_of([[1]] * 5 + [[1] * 90] + [[1]] * 5)
    lengths = [part.lengths.tolist() for part in histories.parts(4, 100)]
    assert lengths == [[1] * 4, [1], [90], [1] * 4, [1]]
    assert [len(part.user_ids) for part in histories.parts(100, None)] == [11]
    assert [len(part.user_ids) for part in histories_of([[1] * 9, [1] * 9]).parts(100, 5)] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected a number from 1 to 149, the items of the catalogue, found 0"),
        ({"k": 150}, "k: .* found 150"),
        ({"k": 2.0}, "k: .* found 2.0"),
        ({"k": True}, "k: .* found True"),
        ({"allowed": np.zeros(ITEMS, dtype=bool)}, "allow, deny: expected to leave items"),
    ],
)
def test_a_wrong_argument_is_refused_at_the_call(model, arguments, message):
    with pytest.raises(InputError, match=message):
        recommend(model, histories_of([[1]]), **arguments)


def test_a_score_that_is_not_finite_is_an_error(model):
    joined = model.joined.clone()
    joined[5, 0] = torch.nan
    with pytest.raises(InputError, match="2 of 2 users have a score that is not finite; the model has diverged"):
        list(recommend(replace(model, joined=joined), histories_of([[1], [2]])))


def test_files_hold_the_recommendations_of_all_parts(model, monkeypatch, tmp_path):
    monkeypatch.setattr(recommendation, "USERS_AT_ONCE", 2)
    histories = histories_of([[4, 8], [1], [], [2, 3], [140]])
    allowed = np.arange(ITEMS) < 6
    parts = list(recommend(model, histories, 6, allowed=allowed))
    result = all_of(parts)
    expected = []
    for user, items, scores in zip(result.user_ids, result.items.tolist(), result.scores):
        rows = [(user, model.catalogue.item_ids[item - 1], score) for item, score in zip(items, scores) if item]
        expected += [(user_id, rank, item_id, score) for rank, (user_id, item_id, score) in enumerate(rows, start=1)]
    assert 5 <= len(expected) < 30
    for suffix in ("jsonl", "csv", "parquet"):
        write_recommendations(tmp_path / f"best.{suffix}", iter(parts), model.catalogue)
    table = polars.read_parquet(tmp_path / "best.parquet")
    assert table.columns == ["user_id", "rank", "item_id", "score"] and table.rows() == expected
    with (tmp_path / "best.csv").open(newline="") as file:
        rows = [
            (row["user_id"], int(row["rank"]), row["item_id"], np.float32(row["score"])) for row in csv.DictReader(file)
        ]
    assert rows == expected
    lines = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [row["by_popularity"] for row in lines] == [False, False, True, False, False]
    rows = [
        (row["user_id"], rank, *pair) for row in lines for rank, pair in enumerate(zip(row["items"], row["scores"]), 1)
    ]
    assert [(*row[:3], np.float32(row[3])) for row in rows] == expected
    assert [line for part in parts for line in json_lines(part, model.catalogue)] == [*map(json.dumps, lines)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_is_written_whole_or_not_at_all(model, tmp_path, suffix):
    def parts():
        yield from recommend(model, histories_of([[1]]))
        raise InputError("the model has diverged")

    path = tmp_path / f"best.{suffix}"
    path.write_text("before")
    with pytest.raises(InputError, match="the model has diverged"):
        write_recommendations(path, parts(), model.catalogue)
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(InputError, match=r"expected a file named \*.jsonl, \*.csv, \*.parquet, found .txt"):
        write_recommendations(tmp_path / "best.txt", parts(), model.catalogue)


def test_parquet_without_polars_names_the_command_that_installs_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(InputError, match=r"best.parquet: Parquet needs polars; pip install 'iisan-fast\[import\]'"):
        write_recommendations(tmp_path / "best.parquet", iter(()), model.catalogue)
    assert not [*tmp_path.iterdir()]
